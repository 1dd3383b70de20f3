"""Moments in 8 bits: bitsandbytes' own, over one slot's own numbers and nothing else."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import reference
from builders import random_adapter, random_examples, tiny_model, train_job
from cohorts import cohort, settings
from flexlora.lora.adapters import Adapter
from flexlora.planning import memory
from flexlora.planning.memory import state_bytes
from flexlora.training import blockwise
from flexlora.training.blockwise import BlockwiseMoments, Live
from flexlora.training.local import TrainSettings, train
from flexlora.training.optim import SlotOptimizer
from flexlora.training.slots import SlotModel


def floats(*shape, seed=0):
    """Gradients of very different sizes, as those of ``lora_A`` and ``lora_B`` are."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.logspace(-3, 1, shape[-1])


def bitsandbytes_adamw(tensors, rate, weight_decay=0.1):
    import bitsandbytes as bnb

    chosen = {"lr": rate, "eps": 1e-6, "weight_decay": weight_decay}
    return bnb.optim.AdamW8bit(tensors, min_8bit_size=0, **chosen)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("size", "chunk"), [(100, 2**20), (5000, 2**20), (5000, 1024)])
def test_moments_in_8_bits_are_bitsandbytes_own(size, chunk, weight_decay, monkeypatch):
    """Bit by bit, in one call or in parts, with a last block that is not full."""
    monkeypatch.setattr(blockwise, "CHUNK", chunk)
    rows = floats(1, size)
    theirs = rows[0].clone().requires_grad_()
    oracle = bitsandbytes_adamw([theirs], 0.01, weight_decay)
    ours = SlotOptimizer(rows, optim="adamw_8bit", weight_decay=weight_decay)
    for step in range(6):
        gradients, rate = floats(1, size, seed=step + 1), 0.01 / (step + 1)
        ours.step(gradients, [rate])
        oracle.param_groups[0]["lr"] = rate
        theirs.grad = gradients[0].clone()
        oracle.step()
        assert torch.equal(rows[0], theirs.detach())
    assert float((rows - floats(1, size)).abs().max()) > 0.01


RANKS = ([2, 9], [1, 4, 3], [40])


def unequal(model, chosen=(0, 1, 2), trainable=("lora_A", "lora_B")):
    """Slots of other ranks by module, so that all but the largest are padded."""
    slots = SlotModel(model)
    whole = [random_adapter(slots.shapes, RANKS[k], seed=k, dtype=torch.float32) for k in chosen]
    slots.load(whole, trainable=trainable)
    return slots


def stepped(slots, which, live):
    """Six steps on gradients that are drawn slot by slot; slot k ends after 6 - k."""
    made = SlotOptimizer(slots.parameters, optim="adamw_8bit", weight_decay=0.1, live=live)
    own = [live.positions for live in slots.live_numbers()]
    for step in range(6):
        rates = [0.01 * (k + 1) for k in which if step < 6 - k]
        for row, k in enumerate(which):
            where = slice(None) if own[row] is None else own[row]
            size = slots.gradients[row, where].shape
            slots.gradients[row, where] = floats(*size, seed=10 * step + k)
        made.step(slots.gradients, rates)
    return [slots.extract(row) for row in range(len(which))]


@pytest.mark.parametrize("trainable", [("lora_A", "lora_B"), ("lora_B",)])
def test_slots_of_unequal_rank_are_each_what_it_is_alone(trainable):
    """Blocks of 256 see neither another slot's numbers nor padding: the same bits."""
    together = unequal(tiny_model("llama"), trainable=trainable)
    done = stepped(together, (0, 1, 2), together.live_numbers)
    for k, adapter in enumerate(done):
        alone = unequal(tiny_model("llama"), (k,), trainable)
        assert alone.live_numbers()[0].positions is None
        (expected,) = stepped(alone, (k,), alone.live_numbers)
        assert adapter.digest() == expected.digest()
    assert not torch.equal(together.gradients, torch.zeros_like(together.gradients))


def test_blocks_that_see_the_padding_give_other_factors():
    """The control: without its live positions a small slot shares its blocks with zeros."""
    together, alone = unequal(tiny_model("llama")), unequal(tiny_model("llama"), (1,))
    wrong = stepped(together, (0, 1, 2), None)
    (expected,) = stepped(alone, (1,), alone.live_numbers)
    assert reference.adapter_distance(wrong[1], expected) > 1e-4


def test_a_slot_is_bitsandbytes_adamw_over_its_factors_one_by_one():
    """No block holds two factors, whose gradients are of other sizes; bit by bit."""
    slots = unequal(tiny_model("llama"), (1,))
    (live,) = slots.live_numbers()
    assert len(live.sizes) == 28 and sum(live.sizes) == slots.parameters.shape[1]
    assert any(size % blockwise.BLOCK for size in live.sizes)
    theirs = [part.clone().requires_grad_() for part in slots.parameters[0].split(live.sizes)]
    oracle = bitsandbytes_adamw(theirs, 0.01)
    ours, other = (
        SlotOptimizer(rows, optim="adamw_8bit", weight_decay=0.1, live=own)
        for rows, own in ((slots.parameters, slots.live_numbers), (slots.parameters.clone(), None))
    )
    for step in range(4):
        gradients = floats(1, slots.parameters.shape[1], seed=step)
        for optimizer in (ours, other):
            optimizer.step(gradients, [0.01])
        for factor, gradient in zip(theirs, gradients[0].split(live.sizes), strict=True):
            factor.grad = gradient.clone()
        oracle.step()
    expected = torch.cat([factor.detach() for factor in theirs])
    assert torch.equal(ours.parameters[0], expected)
    assert not torch.equal(other.parameters[0], expected), "the control mixes factors in a block"


def test_what_is_live_is_a_slots_own_in_the_order_that_it_has_alone():
    together = unequal(tiny_model("llama"))
    for k, own in enumerate(together.live_numbers()):
        alone = unequal(tiny_model("llama"), (k,))
        where = slice(None) if own.positions is None else own.positions
        assert torch.equal(together.parameters[k, where], alone.parameters[0])
        assert own.sizes == alone.live_numbers()[0].sizes
        outside = together.parameters[k].clone()
        outside[where] = 0.0
        assert not outside.any(), "what is not live is padding"
    twins = SlotModel(tiny_model("llama"))
    pair = [random_adapter(twins.shapes, rank, seed=rank) for rank in (2, 5, 2)]
    twins.load(pair, trainable=("lora_A", "lora_B"))
    first, largest, second = twins.live_numbers()
    assert first is second and largest.positions is None


def in_float32(start):
    trained = {name: f.map(lambda tensor: tensor.float()) for name, f in start.trained.items()}
    return replace(start, trained=Adapter(trained)).sealed()


def distances(slots):
    """Of each client trained in the cohort from itself trained alone, over two steps.

    No more: a code that falls to the other side of a rounding changes its number by a hundredth,
    and AdamW's steps hardly depend on the size of what they are taken from.
    """
    chosen = settings(optim="adamw_8bit", max_steps=2)
    jobs, rows = cohort(slots)
    jobs = [replace(job, start=in_float32(job.start)) for job in jobs]
    found = []
    for k, result in enumerate(train(slots, jobs, rows, chosen)):
        (alone,) = train(slots, [jobs[k]], [rows[k]], chosen)
        found.append(reference.adapter_distance(result.adapter, alone.adapter))
    return found


def test_a_cohort_with_8_bit_moments_trains_as_each_client_alone(monkeypatch):
    slots = SlotModel(tiny_model("llama", dtype=torch.float32))
    assert max(distances(slots)) < 5e-4
    monkeypatch.setattr(
        SlotModel,
        "live_numbers",
        lambda self: [Live(sizes=(row.numel(),)) for row in self.parameters],
    )
    small, _, middle = distances(slots)
    assert min(small, middle) > 1e-3, "the control shares blocks with zeros"


def test_8_bit_moments_learn_as_32_bit_ones_do():
    slots = SlotModel(tiny_model("llama", dtype=torch.float32))
    start = random_adapter(slots.shapes, 8, dtype=torch.float32)
    rows = random_examples(8)
    after = {}
    for optim in ("adamw_torch", "adamw_8bit"):
        chosen = TrainSettings(learning_rate=0.01, max_steps=30, optim=optim)
        (result,) = train(slots, [train_job(start)], [rows], chosen)
        after[optim] = result.loss_after
    assert after["adamw_8bit"] < 0.4 * result.loss_before
    assert after["adamw_8bit"] == pytest.approx(after["adamw_torch"], rel=0.15)
    assert after["adamw_8bit"] != after["adamw_torch"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_whose_gradient_is_not_finite_leaves_the_others_as_they_are(bad):
    rows, start = floats(2, 600), floats(2, 600)
    ours = SlotOptimizer(rows, optim="adamw_8bit")
    alone = start[1:].clone()
    expected = SlotOptimizer(alone, optim="adamw_8bit")
    for step in range(3):
        gradients = floats(2, 600, seed=step)
        gradients[0, 5] = bad
        ours.step(gradients, [0.01, 0.01])
        expected.step(gradients[1:], [0.01])
    assert torch.equal(rows[1], alone[0]) and not torch.isfinite(rows[0]).all()


@pytest.mark.parametrize("size", [100, 256, 5000])
def test_the_bytes_of_8_bit_moments_are_the_planners(size):
    held = SlotOptimizer(floats(1, size), optim="adamw_8bit").moments.nbytes
    assert held == state_bytes("adamw_8bit", size) == state_bytes("paged_adamw_8bit", size)
    assert (blockwise.BLOCK, blockwise.CHUNK) == (memory.MOMENT_BLOCK, memory.MOMENT_CHUNK)


# Managed memory, with stand-ins for the three calls that need CUDA


@pytest.fixture
def managed(monkeypatch):
    """What was asked of CUDA: sizes of new buffers, prefetched bytes, how often it was waited."""
    import bitsandbytes.functional as library

    asked = SimpleNamespace(sizes=[], prefetched=[], waits=0)

    def get_paged(count, dtype, device):
        asked.sizes.append(count)
        made = torch.full((count,), 7, dtype=dtype)
        made.is_paged, made.page_deviceid = True, device.index
        return made

    def prefetch_tensor(tensor):
        assert tensor.is_paged and tensor.page_deviceid is None
        asked.prefetched.append(tensor.numel())

    def synchronize(device):
        asked.waits += 1

    monkeypatch.setattr(library, "get_paged", get_paged)
    monkeypatch.setattr(library, "prefetch_tensor", prefetch_tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(blockwise, "_unused", [])
    return asked


def test_paged_moments_are_the_same_numbers_sent_for_before_every_step(managed):
    both = []
    for paged in (True, False):
        row = floats(1, 700)[0]
        moments = BlockwiseMoments(row[None], [Live(sizes=(700,))], paged=paged)
        waits = managed.waits
        for step in (1, 2):
            rates = {"learning_rate": 0.01, "betas": (0.9, 0.999), "epsilon": 1e-6}
            moments.step(0, row, floats(700, seed=step), step=step, weight_decay=0.0, **rates)
            moments.settle()
        both.append((row, managed.waits - waits))
    assert torch.equal(both[0][0], both[1][0])
    assert managed.prefetched == [700] * 4 and [waits for _, waits in both] == [2, 0]


def test_a_managed_buffer_is_used_again_and_never_by_two(managed):
    """bitsandbytes has no call that gives managed memory back; a round makes an optimizer."""

    def make(size):
        return BlockwiseMoments(floats(1, size), [Live(sizes=(size,))], paged=True)

    first, second = make(700), make(700)
    assert managed.sizes == [2048, 2048]  # 2 * 3 blocks of 256, and the next power of two
    assert first._codes.data_ptr() != second._codes.data_ptr()
    first._codes.fill_(9)
    del first
    third = make(600)
    assert managed.sizes == [2048, 2048] and not third._codes.any()
    make(3000)
    del second, third
    make(100)
    make(3000)
    assert managed.sizes == [2048, 2048, 8192]
