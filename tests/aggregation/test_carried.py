"""What a client carries frozen: one copy for all who carry the same, 16 bits, or in the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import flexlora.training.slots as module
import reference
from builders import random_adapter, random_examples, tiny_model
from cohorts import EPOCHS, cohort, recipe
from flexlora.aggregation import make_method
from flexlora.aggregation.engine.starts import Factoring, LocalPlan
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.algebra.linalg import svd_of_product
from flexlora.data.collation import collate
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.training.local import answer_losses, train
from flexlora.training.slots import SlotModel

MERGE = LocalPlan(merge=True)


@pytest.fixture
def spied(monkeypatch):
    """What the layers held while they trained: a list of (carried, merged) per load and layer."""
    seen = []
    honest = SlotModel.load

    def load(self, *arguments, **options):
        honest(self, *arguments, **options)
        seen.extend((layer.carried, layer.merged) for layer in self.layers.values())

    monkeypatch.setattr(SlotModel, "load", load)
    return seen


def carrying(slots, carried, *, dtype=torch.float64, **start):
    """The cohort of three, each with its entry of ``carried``."""
    jobs, rows = cohort(slots, **start)
    starts = [
        replace(job.start, trained=job.start.trained.to(dtype), carried=own)
        for job, own in zip(jobs, carried, strict=True)
    ]
    pairs = zip(jobs, starts, strict=True)
    return [replace(job, start=start.sealed()) for job, start in pairs], rows


def alike(first, second, bound):
    for one, other in zip(first, second, strict=True):
        assert reference.adapter_distance(one.adapter, other.adapter) < bound
        assert one.train_loss == pytest.approx(other.train_loss, rel=bound)
        assert one.loss_after == pytest.approx(other.loss_after, rel=bound)


# --- in the weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_equals_carried_beside_and_leaves_the_base(kind, spied):
    """GPT-2's Conv1D holds its weights the other way round, some of them square."""
    model = tiny_model(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slots = SlotModel(model)
    one = random_adapter(slots.shapes, 7, alpha=[3.0, 20.0], seed=50)
    beside = train(slots, *carrying(slots, [one] * 3), EPOCHS)
    assert all(carried is not None and merged is None for carried, merged in spied)
    spied.clear()
    merged = train(slots, *carrying(slots, [one] * 3, local=MERGE), EPOCHS)
    assert spied and all(held is None and weight is not None for held, weight in spied)
    alike(merged, beside, 1e-10)
    without = train(slots, *cohort(slots), EPOCHS)
    assert reference.adapter_distance(merged[0].adapter, without[0].adapter) > 1e-2
    slots.remove()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merged_cohort_is_the_plain_loop_over_the_changed_weights(kind):
    slots, plain = SlotModel(tiny_model(kind)), tiny_model(kind)
    one = random_adapter(slots.shapes, 7, seed=50)
    jobs, rows = carrying(slots, [one] * 3, local=MERGE)
    for job, examples, result in zip(jobs, rows, train(slots, jobs, rows, EPOCHS), strict=True):
        own = recipe(job, examples, EPOCHS)
        expected = reference.train_one_client(plain, job.start.trained, examples, own, carried=one)
        assert reference.adapter_distance(result.adapter, expected) < 1e-9


def test_nothing_is_merged_where_slots_carry_different_changes(spied):
    """One weight cannot be two: then all lie beside, as without the wish."""
    slots = SlotModel(tiny_model("llama"))
    different = [random_adapter(slots.shapes, 4 + k, seed=50 + k) for k in range(2)] + [None]
    beside = train(slots, *carrying(slots, different), EPOCHS)
    spied.clear()
    merged = train(slots, *carrying(slots, different, local=MERGE), EPOCHS)
    assert all(held is not None and weight is None for held, weight in spied)
    alike(merged, beside, 1e-12)


def test_a_quantized_or_unknown_linear_is_not_merged():
    """Only the two kinds of float weight whose layout is known; the rest is carried beside."""

    class OwnLinear(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(OwnLinear(6, 5, dtype=torch.float64)).requires_grad_(False)
    slots = SlotModel(model)
    trained, carried = (random_adapter(slots.shapes, 2, seed=seed) for seed in (1, 2))
    slots.load([trained], carried=[carried], merge=True)
    (layer,) = slots.layers.values()
    assert layer.merged is None and layer.carried is not None
    x = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = layer.base.weight + trained.delta_weight("0") + carried.delta_weight("0")
    expected = torch.nn.functional.linear(x, weight, layer.base.bias)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)


# --- one copy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [False, True])
def test_slots_that_carry_the_same_share_one_copy_in_memory(copies, spied, monkeypatch):
    """Also equal adapters that are distinct objects, as every message brings its own."""
    slots = SlotModel(tiny_model("llama"))
    one = random_adapter(slots.shapes, 7, seed=50)
    same = [one.map(torch.clone) if copies else one for _ in range(3)]
    shared = train(slots, *carrying(slots, same), EPOCHS)
    assert {carried.A.shape[0] for carried, _ in spied} == {1}
    spied.clear()
    monkeypatch.setattr(module, "_once", lambda carried: carried)
    separate = train(slots, *carrying(slots, same), EPOCHS)
    assert {carried.A.shape[0] for carried, _ in spied} == {3}
    alike(shared, separate, 1e-10)


def test_slots_that_carry_different_changes_share_nothing(spied):
    """One number apart, or nothing at all in one of them."""
    slots = SlotModel(tiny_model("llama"))
    one = random_adapter(slots.shapes, 7, seed=50)
    other = one.map(torch.clone)
    next(iter(other.values())).lora_B[0, 0] += 1e-9
    for carried in ([one, other], [one, None], [None, one]):
        spied.clear()
        trained = [random_adapter(slots.shapes, 2, seed=k) for k in range(2)]
        slots.load(trained, carried=carried)
        assert {held.A.shape[0] for held, _ in spied} == {2}
    spied.clear()
    slots.load(trained, carried=[None, None])
    assert {held for held, _ in spied} == {None}


# --- sixteen bits ------------------------------------------------------------------------------


def test_carried_factors_in_bfloat16_are_held_so_and_train_as_the_rounded_ones(spied):
    """Held in 16 bits, multiplied in 32: nothing is lost beyond the rounding of the factors."""
    slots = SlotModel(tiny_model("llama", dtype=torch.float32))
    one = random_adapter(slots.shapes, 7, seed=50, dtype=torch.float32)
    rounded = one.to(torch.bfloat16).to(torch.float32)
    options = {"dtype": torch.float32}
    halved = train(
        slots, *carrying(slots, [rounded] * 3, carried_dtype="bfloat16", **options), EPOCHS
    )
    for carried, _ in spied:
        assert carried.A.dtype == carried.B.dtype == torch.bfloat16
        assert carried.scaling.dtype == torch.float32
    spied.clear()
    wide = train(slots, *carrying(slots, [rounded] * 3, **options), EPOCHS)
    assert {carried.A.dtype for carried, _ in spied} == {torch.float32}
    alike(halved, wide, 1e-6)
    unrounded = train(slots, *carrying(slots, [one] * 3, **options), EPOCHS)
    assert reference.adapter_distance(unrounded[0].adapter, wide[0].adapter) > 1e-5


def test_the_bytes_that_are_carried_are_those_in_memory():
    slots = SlotModel(tiny_model("llama", dtype=torch.float32))
    one = random_adapter(slots.shapes, 7, seed=50, dtype=torch.float32)
    jobs, _ = carrying(slots, [one, None, one], dtype=torch.float32, carried_dtype="bfloat16")
    assert [job.start.carried_bytes for job in jobs] == [one.num_bytes // 2, 0, one.num_bytes // 2]
    slots.load([job.start.trained for job in jobs[:1]], carried=[one], carried_dtype=torch.bfloat16)
    held = sum(layer.carried.A.nbytes + layer.carried.B.nbytes for layer in slots.layers.values())
    assert held == jobs[0].start.carried_bytes
    jobs, _ = carrying(slots, [one] * 3, dtype=torch.float32)
    assert jobs[0].start.carried_bytes == one.num_bytes


# --- the method `carried` ----------------------------------------------------------------------


@pytest.mark.parametrize("trained_rank", [1, 3, 6])
def test_trained_factors_and_what_is_carried_beside_add_up_to_the_carried_change(trained_rank):
    """``T_r(G)`` trained and ``T_c(G) - T_r(G)`` frozen: together ``T_c(G)``, for every r."""
    shapes = {"attn.q": (10, 12), "mlp.up": (14, 9)}
    draws = torch.Generator().manual_seed(3)
    dense = {
        name: torch.randn(out, fan_in, generator=draws, dtype=torch.float64)
        for name, (out, fan_in) in shapes.items()
    }
    change = GlobalChange(
        {n: svd_of_product(M, torch.eye(M.shape[1]).double()) for n, M in dense.items()}
    )
    method = make_method("carried", carried_rank=5)
    rank_class = RankClass(name="c", rank=trained_rank)
    start = method.start(State(round=1, change=change), rank_class, Factoring(alpha=8.0))
    assert start.local.gradient_batches == 0
    for name, matrix in dense.items():
        own = start.trained.delta_weight(name)
        assert reference.relative_error(own, reference.truncate(matrix, trained_rank)) < 1e-12
        both = own + (start.carried.delta_weight(name) if start.carried is not None else 0.0)
        wanted = reference.truncate(matrix, max(5, trained_rank))
        assert reference.relative_error(both, wanted) < 1e-12
        assert reference.relative_error(start.served().delta_weight(name), both) < 1e-12


def test_a_carried_change_is_felt_in_every_gradient():
    """It is frozen, not absent: the trained factors' gradient is that at the carried model."""
    model = tiny_model("llama")
    slots, plain = SlotModel(model), tiny_model("llama")
    trained, carried = (random_adapter(slots.shapes, 3, seed=seed) for seed in (1, 2))
    rows = random_examples(3, seed=1)
    slots.load([trained], carried=[carried], trainable=("lora_A", "lora_B"))
    (losses,) = answer_losses(slots, collate([rows], pad_token_id=0))
    slots.accumulate_gradients(losses.sum())
    leaves = Adapter(
        {name: f.map(lambda t: t.clone().requires_grad_()) for name, f in trained.items()}
    )
    total = sum(
        reference.answer_loss(reference.logits_of(plain, [leaves, carried], row.input_ids), row)
        for row in rows
    )
    total.backward()
    grads = [tensor.grad for f in leaves.values() for tensor in (f.lora_A, f.lora_B)]
    norm = sum(float(grad.square().sum()) for grad in grads)
    assert float(slots.gradients.square().sum()) == pytest.approx(norm, rel=1e-9)
