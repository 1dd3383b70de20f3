"""Work that is per adapter is done once per adapter of a cohort, not once per module."""

import hashlib

import bitsandbytes.functional
import pytest
import torch

import flexlora.aggregation.engine.starts as starts
import flexlora.lora.adapters as adapters
import reference
from builders import random_adapter, tiny_model
from flexlora.aggregation.engine.starts import LocalPlan, Start
from flexlora.algebra.sketch import top_rows
from flexlora.evaluation.cohorts import EvalPlan
from flexlora.lora.ranks import RankClass
from flexlora.simulations.benchmarks import cohort_load
from flexlora.training.optim import SlotOptimizer
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import EvalJob

BOTH = ("lora_A", "lora_B")


@pytest.fixture(scope="module")
def slots():
    return SlotModel(tiny_model("llama", dtype=torch.float32))


def counted(monkeypatch, module, name):
    """The calls of ``module.name`` from now on."""
    calls, plain = [], getattr(module, name)

    def call(*args, **options):
        calls.append(args)
        return plain(*args, **options)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.fixture
def digests(monkeypatch):
    class Hashes:
        calls = 0

        def sha256(self, *data):
            self.calls += 1
            return hashlib.sha256(*data)

    hashes = Hashes()
    monkeypatch.setattr(adapters, "hashlib", hashes)
    return hashes


def test_a_carried_adapter_is_digested_once(slots, digests):
    trained = [random_adapter(slots.shapes, 2 + k % 3, seed=k) for k in range(6)]
    equal = [random_adapter(slots.shapes, 4, seed=9) for _ in trained]
    slots.load(trained, carried=equal, trainable=BOTH)
    assert all(layer.carried.A.shape[0] == 1 for layer in slots.layers.values())
    assert digests.calls == len(equal) < len(slots.shapes)
    slots.load(trained, carried=[*equal[:-1], trained[0]], trainable=BOTH)
    assert all(layer.carried.A.shape[0] == 6 for layer in slots.layers.values())
    assert digests.calls == len(equal) + 1


def test_evaluation_jobs_of_one_adapter_digest_it_once(slots, digests):
    shared = {"x": random_adapter(slots.shapes, 2), "y": random_adapter(slots.shapes, 3)}
    jobs = [EvalJob(client_id=f"c{k}", server_round=1, adapters=shared) for k in range(8)]
    for _ in range(2):
        assert [*EvalPlan(jobs=jobs, examples=[[None]] * 8).groups()] == [list(range(8))]
    assert digests.calls == 2


def test_a_digest_follows_a_change_in_place(slots, digests):
    adapter = random_adapter(slots.shapes, 2)
    first = adapter.digest()
    assert adapter.digest() == first and digests.calls == 1
    next(iter(adapter.values())).lora_B[0, 0] += 1.0
    assert (
        adapter.digest() not in (first, "")
        and adapter.digest() == adapter.map(torch.clone).digest()
    )


def test_terms_are_drawn_once_for_all_modules_of_a_client(slots, monkeypatch):
    start = Start(
        rank_class=RankClass.of(2),
        base_round=3,
        trained=random_adapter(slots.shapes, 5),
        local=LocalPlan(select=True),
    )
    draws = counted(monkeypatch, starts, "numpy_generator")
    assert {factors.rank for factors in start.for_client("c").trained.values()} == {2}
    assert len(draws) == 1


@pytest.mark.parametrize("ranks", [(8, 16), (3, 5)], ids=["whole blocks", "inside a block"])
def test_8_bits_step_a_slot_in_one_call(monkeypatch, slots, ranks):
    """Factors of rank 3 and 5 end inside a block of 256 numbers."""
    trained = [random_adapter(slots.shapes, rank, dtype=torch.float32) for rank in ranks]
    slots.load(trained, trainable=BOTH)
    optimizer = SlotOptimizer(slots.parameters, optim="adamw_8bit", live=slots.live_numbers)
    calls = counted(monkeypatch, bitsandbytes.functional, "optimizer_update_8bit_blockwise")
    with torch.no_grad():
        optimizer.step(torch.where(slots.parameters == 0, 0.0, 0.01), [1e-3, 1e-3])
    assert len(calls) == len(ranks)
    moved = [slots.extract(k) for k in range(2)]
    for old, new in zip(trained, moved, strict=True):
        assert reference.adapter_distance(old, new) > 1e-4
    assert not slots.parameters[0][_padding(slots, ranks[0])].any()


def _padding(slots, rank):
    """Positions of a row that are beyond the slot's rank."""
    inside = slots.live_numbers()[0].positions
    outside = torch.ones(slots.parameters.shape[1], dtype=torch.bool)
    outside[inside] = False
    assert outside.any(), rank
    return outside


def test_top_rows_of_a_batch_are_those_one_by_one():
    draw = torch.Generator().manual_seed(4)
    sketch = torch.randn(5, 12, 30, generator=draw)
    sketch[1, 1:] = 0.0  # one direction
    sketch[2] = 0.0
    fallback = torch.randn(5, 3, 30, generator=draw)
    together = top_rows(sketch, 3, fallback)
    for k in range(5):
        assert torch.equal(together[k], top_rows(sketch[k], 3, fallback[k]))
    assert torch.equal(together[2], fallback[2]) and torch.equal(together[1, 1:], fallback[1, 1:])
    assert not torch.equal(together[1, 0], fallback[1, 0])


def test_the_benchmark_times_every_step(tmp_path):
    seconds = cohort_load.main(["--layers", "1", "--slots", "3", "--json", str(tmp_path / "j")])
    assert "load, aligned" in seconds and all(value >= 0.0 for value in seconds.values())
    assert (tmp_path / "j").read_text().count(":") == len(seconds)
