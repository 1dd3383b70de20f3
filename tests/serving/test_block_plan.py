"""Blocks of a step: exact whatever is merged, cheap where it should be."""

import random

import pytest
import torch
from torch import nn

from builders import random_adapter
from flexlora.serving.block_plan import BlockCosts, Segment, plan_blocks
from flexlora.serving.rank_arena import RankArena, Rows
from flexlora.serving.served_layers import ServedLinear, StepBlocks

CPU, F64 = torch.device("cpu"), torch.float64
SHAPES = {"up": (11, 7)}
RANKS = (2, 64, 5, 1, 16, 3)


def segments_of(arena, sizes):
    """``sizes[k]`` tokens of adapter k in the order of the arena, one base token before each."""
    found, at = [], 0
    for key, size in sorted(sizes.items(), key=lambda item: arena[item[0]]):
        at += 1
        if size:
            found.append(Segment(start=at, stop=at + size, rows=arena[key]))
        at += size
    return found, at


@pytest.mark.parametrize("call_flops", [0.0, 3e3, 1e12])
@pytest.mark.parametrize("seed", range(4))
def test_tokens_meet_their_own_adapter_only(call_flops, seed):
    """Against one product per segment, with every way of merging; base tokens in between."""
    draw = random.Random(seed)
    arena = RankArena(SHAPES, max_rows=500, dtype=F64, device=CPU)
    adapters = {k: random_adapter(SHAPES, rank, seed=k) for k, rank in enumerate(RANKS)}
    order = draw.sample(list(adapters), len(adapters))
    for key in order:
        arena.place(key, adapters[key])
    arena.remove(order.pop(2))  # a gap with old numbers in it
    segments, tokens = segments_of(arena, {key: draw.randint(0, 6) for key in order})
    blocks = plan_blocks(segments, BlockCosts(width=18, call_flops=call_flops), CPU)
    linear = nn.Linear(7, 11).double()
    layer = ServedLinear(linear, "up", arena, StepBlocks(blocks=blocks, tokens=tokens))
    x = torch.randn(1, tokens, 7, dtype=F64)
    expected = linear(x).detach().clone()
    for key in order:
        for segment in segments:
            if segment.rows == arena[key]:
                part = slice(segment.start, segment.stop)
                expected[:, part] += x[:, part] @ adapters[key].delta_weight("up").T
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    if call_flops == 0.0:
        assert len(blocks) >= len(segments) - 1, "free calls: nearly nothing is merged"


def test_short_answers_share_blocks_and_long_prompts_are_alone():
    costs = BlockCosts(width=256, call_flops=5e5)
    small = [Segment(start=2 * k, stop=2 * k + 2, rows=Rows(8 * k, 8 * k + 8)) for k in range(32)]
    prompt = Segment(start=64, stop=264, rows=Rows(0, 8))
    blocks = plan_blocks([*small, prompt], costs, CPU)
    assert (blocks[-1].start, blocks[-1].stop, blocks[-1].foreign) == (64, 264, None)
    assert 1 < len(blocks) - 1 < 16
    cost = sum(costs.of_block(b.stop - b.start, b.last - b.first) for b in blocks)
    apart = sum(costs.of_block(2, 8) for _ in small) + costs.of_block(200, 8)
    at_once = costs.of_block(64, 256) + costs.of_block(200, 8)
    assert cost < min(apart, at_once)


def test_an_overflow_in_another_adapters_columns_stays_out():
    """Infinity times a mask of zero would be NaN."""
    arena = RankArena(SHAPES, max_rows=8, dtype=torch.float32, device=CPU)
    tame = random_adapter(SHAPES, 2, seed=1, dtype=torch.float32)
    wild = random_adapter(SHAPES, 2, alpha=2.0, seed=2, dtype=torch.float32).map(
        lambda t: t.sign() * 3e38
    )
    arena.place("tame", tame)
    arena.place("wild", wild)
    segments = [Segment(start=0, stop=1, rows=arena["tame"])]
    segments.append(Segment(start=1, stop=2, rows=arena["wild"]))
    blocks = plan_blocks(segments, BlockCosts(width=18, call_flops=1e12), CPU)
    assert len(blocks) == 1
    layer = ServedLinear(nn.Linear(7, 11), "up", arena, StepBlocks(blocks=blocks, tokens=2))
    x = torch.full((1, 2, 7), 10.0)
    with torch.no_grad():
        found = layer(x)
        expected = layer.base(x)[0, 0] + x[0, 0] @ tame.delta_weight("up").T
    torch.testing.assert_close(found[0, 0], expected)
    assert not torch.isfinite(found[0, 1]).all(), "the control: the other token overflows"
    with pytest.raises(ValueError, match="module 'up' got 3 tokens, expected the 2 of the step"):
        layer(torch.zeros(3, 7))
