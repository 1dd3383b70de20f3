"""A client without enough memory: smaller passes, then a lower rank, and the round goes on."""

import math
import re

import pytest
import torch

import reference
from builders import random_adapter, random_examples, tiny_model, train_job
from expected_rounds import expected_state
from federation import (
    TamperingGrid,
    client_rows,
    federation,
    relative_gap,
    rounds,
    same_bytes,
    small,
    state_delta,
)
from flexlora.aggregation import METHODS
from flexlora.clients.worker import Worker, worker_for
from flexlora.lora.adapters import Adapter
from flexlora.simulations.engine.cohorts import CohortLimits
from flexlora.simulations.engine.grid import InProcessGrid
from flexlora.simulations.simulate import simulate
from flexlora.training.local import TrainSettings, train
from flexlora.training.out_of_memory import is_out_of_memory, train_within_memory, within_memory
from flexlora.training.slots import SlotModel

VICTIM = "client_02"


@pytest.fixture
def worker():
    """Its own each time: a worker remembers who ran out of memory."""
    return Worker(small())


def short_of_memory(monkeypatch, fails, victim=VICTIM):
    """Training raises for ``victim`` where ``fails(rank, rows in a pass)``; the tries are kept."""
    import flexlora.clients.worker as module

    honest, tries = module.train, []

    def train(slots, jobs, examples, settings, **options):
        for job in jobs:
            if job.client_id == victim:
                trained = job.start.for_client(job.client_id).trained
                rank = max(factors.rank for factors in trained.values())
                tries.append((len(jobs), rank, settings.rows_per_pass))
                if fails(rank, settings.rows_per_pass):
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return honest(slots, jobs, examples, settings, **options)

    monkeypatch.setattr(module, "train", train)
    return tries


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_size_is_halved_down_to_one():
    tried = []

    def work(size):
        tried.append(size)
        if size > 2:
            raise MemoryError
        return "done"

    assert within_memory(work, 11) == ("done", 2) and tried == [11, 5, 2]
    assert within_memory(lambda size: 1 // 0 if size < 0 else "whole", 8) == ("whole", 8)
    with pytest.raises(ZeroDivisionError):
        within_memory(lambda size: 1 // 0, 8)


def test_nothing_of_the_failed_pass_is_held_while_the_next_runs():
    """The error's frames hold the activations; on a full card the retry would fail with them."""
    import weakref

    class Held:
        pass

    alive = []

    def work(size):
        assert not any(reference() for reference in alive), "the failed pass is still held"
        held = Held()
        alive.append(weakref.ref(held))
        if size > 1:
            raise MemoryError(held)
        return size

    assert within_memory(work, 4) == (1, 1) and len(alive) == 3


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_a_step_in_smaller_passes_has_the_same_gradient(rows):
    """The mean is over the answer tokens of all rows of the step, however they are split."""
    slots = SlotModel(tiny_model("llama"))
    start = random_adapter(slots.shapes, 3, seed=1)
    examples = [random_examples(7, seed=3)]
    chosen = {"learning_rate": 0.05, "optim": "sgd", "max_steps": 2, "max_grad_norm": 0.0}
    settings = TrainSettings(per_device_train_batch_size=5, **chosen)
    smaller = TrainSettings(per_device_train_batch_size=5, micro_batch_size=rows, **chosen)
    assert smaller.examples_per_step == settings.examples_per_step == 5
    whole, split = (train(slots, [train_job(start)], examples, s)[0] for s in (settings, smaller))
    assert reference.adapter_distance(whole.adapter, start) > 1e-3
    assert reference.adapter_distance(split.adapter, whole.adapter) < 1e-12
    assert split.loss_before == pytest.approx(whole.loss_before, rel=1e-12)
    assert split.train_loss == pytest.approx(whole.train_loss, rel=1e-12)


def test_a_smaller_batch_is_another_step():
    """The negative control: fewer rows in a step, not in a pass, give another adapter."""
    slots = SlotModel(tiny_model("llama"))
    start = random_adapter(slots.shapes, 3, seed=1)
    results = [
        train(
            slots,
            [train_job(start)],
            [random_examples(7, seed=3)],
            TrainSettings(optim="sgd", max_steps=2, per_device_train_batch_size=rows),
        )[0]
        for rows in (4, 2)
    ]
    assert reference.adapter_distance(results[0].adapter, results[1].adapter) > 1e-4


def test_a_client_whose_training_runs_out_of_memory_twice_asks_for_a_lower_rank(
    worker, tmp_path, monkeypatch
):
    """The round completes without it, bit for bit; from the next on it trains at the new rank."""
    tries = short_of_memory(monkeypatch, lambda rank, rows: rank > 2)
    config = small(num_server_rounds=2, ranks__policy="fixed", ranks__fixed=4)
    grid = TamperingGrid(worker)
    strategy, run = federation(grid, config, tmp_path / "run")
    assert tries == [(1, 4, 2), (1, 4, 1), (1, 2, 1)]  # twice, then in the lower class
    first, second = ({r["client_id"]: r for r in client_rows(run.path, n)} for n in (1, 2))
    assert first[VICTIM]["status"] == "failed" and first[VICTIM]["rank"] == "4"
    assert first[VICTIM]["cause"] == (
        "out of memory at rank 4 with 1 row in a pass; asks for rank 2"
    )
    assert (second[VICTIM]["status"], second[VICTIM]["rank"]) == ("ok", "2")
    assert second[VICTIM]["rank_class"] == "rank_2" and second[VICTIM]["cause"] == ""
    assert [row["status"] for name, row in first.items() if name != VICTIM] == ["ok"] * 3
    assert [row["rank"] for name, row in second.items() if name != VICTIM] == ["4"] * 3
    assert rounds(run.path)[1]["clients_failed"] == 1 and rounds(run.path)[2]["clients_ok"] == 4

    alone = TamperingGrid(Worker(small()))
    once, _ = federation(alone, config.with_values({"num-server-rounds": 1}), tmp_path / "one")
    without = expected_state(alone, config, without=(VICTIM,))
    assert same_bytes(once.state, without)
    _, classes = run.load_checkpoint()
    assert classes[VICTIM].rank == 2 and strategy.roster.members[VICTIM].rank_class.rank == 2


def test_smaller_passes_count_and_say_so_once(worker, tmp_path, monkeypatch):
    tries = short_of_memory(monkeypatch, lambda rank, rows: rows > 1)
    config = small(num_server_rounds=2)
    strategy, run = federation(TamperingGrid(worker), config, tmp_path / "run")
    first, second = ({r["client_id"]: r for r in client_rows(run.path, n)} for n in (1, 2))
    assert first[VICTIM]["status"] == second[VICTIM]["status"] == "ok"
    assert first[VICTIM]["cause"] == "out of memory with 2 rows in a pass: trained with 1"
    assert second[VICTIM]["cause"] == "" and first[VICTIM]["rank"] == second[VICTIM]["rank"]
    assert [rows for _, _, rows in tries] == [2, 1, 1], "it remembers what fits"
    monkeypatch.undo()
    plain, _ = federation(TamperingGrid(Worker(small())), config, tmp_path / "plain")
    ours, theirs = state_delta(strategy.state), state_delta(plain.state)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


def test_in_a_cohort_only_the_client_that_is_short_pays(worker, tmp_path, monkeypatch):
    tries = short_of_memory(monkeypatch, lambda rank, rows: rank > 1)
    config = small(ranks__policy="fixed", ranks__fixed=4)
    grid = InProcessGrid(worker, limits=CohortLimits(clients=4), wire_dtype="float32")
    _, run = federation(grid, config, tmp_path / "run")
    rows = {row["client_id"]: row for row in client_rows(run.path, 1)}
    counts = [count for count, _, _ in tries]
    assert counts[:2] == [4, 2] and set(counts[2:]) == {1}
    assert sum(row["status"] == "ok" for row in rows.values()) == 3
    assert "asks for rank 2" in rows[VICTIM]["cause"]
    assert not any(row["cause"] for row in rows.values() if row["client_id"] != VICTIM)


def crowded(monkeypatch, most):
    """Training runs out of memory with more than ``most`` clients in a pass; the sizes tried."""
    import flexlora.clients.worker as module

    honest, sizes = module.train, []

    def train(slots, jobs, *rest, **options):
        sizes.append(len(jobs))
        if len(jobs) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return honest(slots, jobs, *rest, **options)

    monkeypatch.setattr(module, "train", train)
    return sizes


@pytest.mark.parametrize(
    ("most", "tried", "then"),
    [(2, [4, 2, 2], [2, 2]), (1, [4, 2, 1, 1, 2, 1, 1], [1, 1, 1, 1])],
)
def test_a_cohort_that_runs_out_of_memory_is_halved_and_not_planned_again(
    most, tried, then, tmp_path, monkeypatch
):
    config = small(num_server_rounds=2, population__examples="")
    worker = Worker(config)
    plain = InProcessGrid(worker, limits=CohortLimits(clients=4), wire_dtype="float32")
    whole, _ = federation(plain, config, tmp_path / "whole")
    sizes = crowded(monkeypatch, most)
    grid = InProcessGrid(worker, limits=CohortLimits(clients=4), wire_dtype="float32")
    strategy, run = federation(grid, config, tmp_path / "run")
    assert sizes == tried + then
    rows = client_rows(run.path)
    assert all(row["status"] == "ok" for row in rows)
    noted = {(row["round"], row["cause"]) for row in rows if row["cause"]}
    assert noted == {
        ("1", f"out of memory with {2 * most} clients in a pass: trained fewer together")
    }
    assert relative_gap(state_delta(strategy.state), state_delta(whole.state)) < 1e-3


def test_a_resumed_run_plans_as_the_run_that_learnt_it(tmp_path, monkeypatch):
    config = small(num_server_rounds=2, engine__cohort_size=4)
    sizes = crowded(monkeypatch, 2)
    simulate(config.with_values({"num-server-rounds": 1}), tmp_path / "run")
    assert sizes == [4, 2, 2]
    text = (tmp_path / "run" / "cohorts.json").read_text()
    again = InProcessGrid(
        Worker(config),
        limits=CohortLimits(clients=4),
        wire_dtype="float32",
        failed_file=tmp_path / "run" / "cohorts.json",
    )
    (failed,) = again.limits.failed
    assert failed[0] == 4 and str(failed[1]) in text
    assert not again.limits.fits(4, failed[1]) and again.limits.fits(2, failed[1])
    assert again.limits.fits(4, failed[1] - 1)
    sizes.clear()
    simulate(config.with_values({"num-server-rounds": 1}), tmp_path / "run", overwrite=True)
    assert sizes == [4, 2, 2], "a new run does not know what the old one learnt"


def test_a_client_that_is_too_large_by_itself_does_not_shrink_the_cohorts(
    worker, tmp_path, monkeypatch
):
    short_of_memory(monkeypatch, lambda rank, rows: rows > 1)
    grid = InProcessGrid(worker, limits=CohortLimits(clients=4), wire_dtype="float32")
    federation(grid, small(), tmp_path / "run")
    assert grid.limits.failed == ()


def test_limits_remember_the_smallest_pass_that_failed():
    limits = CohortLimits(clients=64, tokens=4096)
    learnt = limits.without(16, 4000).without(8, 2000).without(32, 1000)
    assert learnt.failed == ((8, 2000), (32, 1000))
    assert learnt.without(9, 2001) is learnt
    assert learnt.fits(31, 1999) and learnt.fits(7, 4096)
    assert not learnt.fits(8, 2000) and not learnt.fits(32, 1000) and not learnt.fits(7, 4097)


def test_another_error_of_a_cohort_is_no_lack_of_memory(worker, tmp_path, monkeypatch):
    import flexlora.clients.worker as module

    honest = module.train

    def train(slots, jobs, *rest, **options):
        if len(jobs) > 1:
            raise ValueError("shapes differ")
        return honest(slots, jobs, *rest, **options)

    monkeypatch.setattr(module, "train", train)
    grid = InProcessGrid(worker, limits=CohortLimits(clients=4), wire_dtype="float32")
    _, run = federation(grid, small(), tmp_path / "run")
    assert {(row["status"], row["cause"]) for row in client_rows(run.path)} == {("ok", "")}


def test_below_rank_one_there_is_nothing_to_ask_for(worker, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, lambda rank, rows: True)
    config = small(num_server_rounds=3, ranks__policy="fixed", ranks__fixed=2)
    strategy, run = federation(TamperingGrid(worker), config, tmp_path / "run")
    causes = [r["cause"] for r in client_rows(run.path) if r["client_id"] == VICTIM]
    assert "asks for rank 1" in causes[0] and "asks" not in causes[1] + causes[2]
    assert causes[1] == (
        "out of memory at rank 1 with 1 row in a pass; lower train.max-length or quantize the base"
    )
    assert strategy.roster.members[VICTIM].rank_class.rank == 1
    assert [row["clients_ok"] for row in rounds(run.path)[1:]] == [3, 3, 3]


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        *((rank, "out of memory") for rank in (4, 5, 1000, 0)),
        (-3, "unreadable reply: 'asked-rank' is -3"),
    ],
)
def test_a_rank_that_is_not_lower_is_not_granted(asked, cause, worker, tmp_path):
    """Who asks is outside the server's walls: it may lower its own rank and nothing else."""

    def asking(reply, message):
        report = reply.content["report"]
        report["asked-rank"], report["cause"] = asked, "out of memory"
        return [reply]

    config = small(ranks__policy="fixed", ranks__fixed=4)
    grid = TamperingGrid(worker, tamper=asking, victims=[VICTIM])
    strategy, run = federation(grid, config, tmp_path / "run")
    assert strategy.roster.members[VICTIM].rank_class.name == "rank_4"
    (row,) = (r for r in client_rows(run.path, 1) if r["client_id"] == VICTIM)
    assert row["status"] == "failed" and row["cause"].startswith(cause)


def test_the_largest_rank_of_a_pattern_is_the_one_that_is_halved():
    """30 in attention, 200 in the MLP: 100 and 30 are the next that take less."""
    slots = SlotModel(tiny_model("llama"))
    modules = random_adapter(slots.shapes, 2, seed=1)
    wide = random_adapter(slots.shapes, 6, seed=2)
    mixed = Adapter({n: (wide if "mlp" in n else modules)[n] for n in modules})

    def never(rows):
        raise MemoryError

    result, rows = train_within_memory(never, train_job(mixed), 8)
    assert (result.asked_rank, rows, result.adapter) == (3, 1, None)
    assert re.search("at rank 6 .* asks for rank 3", result.cause)
    assert math.isnan(result.train_loss)


def test_an_evaluation_that_is_too_large_is_done_in_smaller_passes(worker, tmp_path, monkeypatch):
    import flexlora.clients.worker as module

    honest, sizes = module.evaluate, []

    def evaluate(*arguments, batch_size, **options):
        sizes.append(batch_size)
        if batch_size > 16:
            raise MemoryError
        return honest(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(module, "evaluate", evaluate)
    _, run = federation(TamperingGrid(worker), small(), tmp_path / "run")
    assert sizes[:3] == [64, 32, 16]
    assert all(row["eval_loss"] > 0 for row in rounds(run.path))


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"hetlora"}))
def test_with_every_method_the_run_goes_on_at_the_lower_rank(method, tmp_path, monkeypatch):
    """HetLoRA lowers ranks by itself (``test_method_runs.py``)."""
    short_of_memory(monkeypatch, lambda rank, rows: rank > 2)
    config = small(
        method__name=method,
        num_server_rounds=2,
        ranks__policy="fixed",
        ranks__fixed=4,
        **({"method__sparse_rounds": 0} if method == "slora" else {}),
    )
    grid = InProcessGrid(worker_for(small()), limits=CohortLimits(clients=4), wire_dtype="float32")
    strategy, run = federation(grid, config, tmp_path / "run")
    by_round = [{r["client_id"]: r for r in client_rows(run.path, n)} for n in (1, 2)]
    assert [rows[VICTIM]["status"] for rows in by_round] == ["failed", "ok"], by_round
    assert by_round[1][VICTIM]["rank"] == "2" and rounds(run.path)[2]["clients_ok"] == 4
    assert all(bool(torch.isfinite(d).all()) for d in state_delta(strategy.state).values())
