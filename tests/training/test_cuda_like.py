"""Training, evaluation and generation on a device that raises as CUDA does, where there is none."""

import pytest
import torch

import reference
from builders import random_adapter, tiny_model
from cohorts import cohort, settings
from cuda_like import DEVICE, CudaTensor, cuda_like
from federation import adapter_bytes, client_rows, federation, rounds, small
from flexlora.clients.worker import Worker
from flexlora.deploy.doctor import check_cuda
from flexlora.planning.probing import device_name, free_bytes, probe
from flexlora.simulations.engine.cohorts import CohortLimits, limits_of, resolved_limits
from flexlora.simulations.engine.grid import InProcessGrid
from flexlora.training.local import train
from flexlora.training.models import pick_device
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import EvalJob

FAST = settings(max_steps=2, learning_rate=1e-3)


@pytest.fixture
def card():
    with cuda_like() as card:
        yield card


@pytest.fixture(scope="module")
def on_both():
    """The same frozen model on the device and on the host."""
    with cuda_like():
        there = SlotModel(tiny_model("llama", dtype=torch.float32).to("cuda"))
    return there, SlotModel(tiny_model("llama", dtype=torch.float32))


MIXED = {
    "sum": lambda there, here: there + here,
    "sum in place": lambda there, here: here.add_(there),
    "product": lambda there, here: here @ there.T,
    "concatenation": lambda there, here: torch.cat([there, here]),
    "comparison": lambda there, here: torch.isin(there, here),
    "solution": lambda there, here: torch.linalg.solve(there + torch.eye(3, device="cuda"), here),
    "loss": lambda there, here: torch.nn.functional.cross_entropy(there, here.argmax(1)),
}


@pytest.mark.parametrize("operation", MIXED.values(), ids=MIXED)
def test_tensors_of_two_devices_do_not_mix(card, operation):
    there, here = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
    assert operation(there, here.to(there.device)).device == DEVICE
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
        operation(there, here)


def test_what_cuda_lets_pass_passes(card):
    there = torch.arange(6.0, device="cuda").view(2, 3)
    assert (there * torch.tensor(2.0)).tolist() == [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]
    assert there[torch.tensor([1])].tolist() == [[3.0, 4.0, 5.0]]
    assert torch.zeros(2, 3).copy_(there).device == torch.device("cpu")
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        torch.ones(3)[torch.tensor([0], device="cuda")]


def test_numpy_generators_and_devices_are_refused_as_by_cuda(card):
    there = torch.ones(3, device="cuda")
    assert there.cpu().numpy().tolist() == there.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        there.numpy()
    assert torch.rand(3, generator=torch.Generator("cuda"), device="cuda").device == DEVICE
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.rand(3, generator=torch.Generator(), device="cuda")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(3, device="cuda:1")
    with pytest.raises(ValueError, match=r"Expected a torch\.device with a specified index"):
        torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda"))


def test_memory_is_counted_limited_and_freed():
    with cuda_like(total_bytes=1000) as card:
        held = torch.zeros(500, dtype=torch.uint8, device="cuda")
        view = held[:10]
        del held
        assert torch.cuda.memory_allocated() == 500
        assert torch.cuda.mem_get_info(torch.device("cuda")) == (500, 1000)
        with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
            torch.zeros(501, dtype=torch.uint8, device="cuda")
        del view
        torch.cuda.set_per_process_memory_fraction(0.4, 0)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.zeros(401, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_allocated() == 0 and torch.cuda.max_memory_allocated() == 500
        assert "_cuda_setMemoryFraction" in card.calls


def test_the_card_is_named_by_its_index(card):
    assert pick_device("auto") == pick_device("cuda") == DEVICE
    assert pick_device("cpu") == torch.device("cpu")
    assert device_name(DEVICE) == "cuda (A device like CUDA)"
    assert free_bytes(DEVICE) == 2**33
    assert "bf16" in probe(DEVICE).runs
    assert check_cuda().message == "cuda (A device like CUDA), 8.0 GiB free"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_dropout": 0.3, "gradient_checkpointing": True},
        {"micro_batch_size": 1, "weight_decay": 0.1, "proximal_mu": 0.1},
    ],
    ids=str,
)
def test_training_there_is_training_here(on_both, card, changes):
    """A cohort of three with carried factors, and its first client alone."""
    there, here = on_both
    jobs, rows = cohort(there, carried=True)
    for k in (3, 1):
        chosen = FAST.model_copy(update=changes)
        on_card = train(there, jobs[:k], rows[:k], chosen)
        on_host = train(here, jobs[:k], rows[:k], chosen)
        for one, other in zip(on_card, on_host, strict=True):
            assert not isinstance(next(iter(one.adapter.values())).lora_A, CudaTensor)
            assert reference.adapter_distance(one.adapter, other.adapter) < 1e-5
            assert one.loss_after == pytest.approx(other.loss_after, rel=1e-5)


FEDERATIONS = {
    "flexlora": {"method__name": "flexlora"},
    "carried, bfloat16": {"method__name": "carried", "model__dtype": "bfloat16"},
    "aligned": {"method__name": "aligned"},
    "hetlora": {"method__name": "hetlora"},
    "personal": {"personal__rank": 2, "personal__max_steps": 1},
}


@pytest.mark.parametrize("changes", FEDERATIONS.values(), ids=FEDERATIONS)
def test_a_round_with_generation_runs_there(card, tmp_path, changes):
    config = small(eval__generate="ends", eval__max_new_tokens=2, clients__count=3, **changes)
    worker = Worker(config)
    assert worker.base.device == worker.base.model.device == DEVICE
    config = resolved_limits(config, worker)
    grid = InProcessGrid(worker, limits=limits_of(config), wire_dtype=config.wire.dtype)
    federation(grid, config, tmp_path / "run")
    assert [row["cause"] for row in client_rows(tmp_path / "run", 1)] == [""] * 3
    assert rounds(tmp_path / "run")[-1]["eval_exact_match"] >= 0.0
    assert adapter_bytes(tmp_path / "run")


def test_scores_there_are_scores_here(card):
    jobs, found = None, []
    for device in ("cuda", "cpu"):
        worker = Worker(small(engine__device=device, eval__max_new_tokens=3))
        adapters = {
            f"rank_{rank}": random_adapter(worker.shapes, rank, dtype=torch.float32)
            for rank in (2, 4)
        }
        jobs = [
            EvalJob(
                client_id=client_id,
                server_round=1,
                adapters=adapters,
                generate=True,
                personal=random_adapter(worker.shapes, 3, seed=7, dtype=torch.float32),
                personal_over="rank_4",
            )
            for client_id in worker.client_ids[:2]
        ]
        found.append(worker.evaluate(jobs))
    for one, other in zip(*found, strict=True):
        assert one.cause == other.cause == ""
        for name, score in other.scores.items():
            assert one.scores[name].loss == pytest.approx(score.loss, rel=1e-4)
            assert one.scores[name].exact_match == score.exact_match


def test_a_card_that_is_too_small_for_a_cohort_trains_its_halves(card, tmp_path):
    """Memory runs out in the real pass, at the bytes that two clients need and four do not have."""
    config = small(ranks__policy="fixed", ranks__fixed=4)
    worker = Worker(config)

    def round_of(clients):
        torch.cuda.reset_peak_memory_stats()
        grid = InProcessGrid(worker, limits=CohortLimits(clients=clients), wire_dtype="float32")
        federation(grid, config, tmp_path / f"{clients}_{card.total_bytes}")
        rows = client_rows(tmp_path / f"{clients}_{card.total_bytes}", 1)
        return grid, [row["cause"] for row in rows], torch.cuda.max_memory_allocated()

    _, _, two = round_of(2)
    _, causes, four = round_of(4)
    assert four > two and causes == [""] * 4
    card.total_bytes = (two + four) // 2
    grid, causes, peak = round_of(4)
    assert set(causes) == {"out of memory with 4 clients in a pass: trained fewer together"}
    assert [clients for clients, _ in grid.limits.failed] == [4] and peak <= card.total_bytes
