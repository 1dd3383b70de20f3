"""Which rows of a batch meet which rows of the arena: blocks that cover the tokens of a step.

A step's tokens are ordered so that those of one adapter are neighbours, adapters in the order of
their arena rows. The low-rank products of all adapters are then a block-diagonal matrix,

    tokens \\ ranks   A_1  A_2  A_3           [[ x_1 A_1^T      .           .     ]
    x_1 (adapter 1)    #    .    .      h  =   [     .      x_2 A_2^T       .     ]
    x_2 (adapter 2)    .    #    .             [     .          .       x_3 A_3^T ]]
    x_3 (adapter 3)    .    .    #            y_k += h_k B

A block is one product over consecutive adapters, with zeros put in off the diagonal. One block
for all costs ``tokens * sum of ranks``, most of it times zero; one block for each adapter costs a
few kernel calls each. Segments are merged from left to right as long as that is cheaper: many short
answers of small adapters share a block, a long prompt is one block. No adapter is padded to
the rank of another (Punica's SGMV, arXiv 2310.18547, has one rank per call).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.serving.rank_arena import Rows

__all__ = ["Block", "BlockCosts", "Segment", "plan_blocks"]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive tokens of a step, all of the adapter in the arena's ``rows``."""

    start: int
    stop: int
    rows: Rows


@dataclass(frozen=True, kw_only=True)
class Block:
    """Tokens ``start`` to ``stop`` times arena rows ``first`` to ``last``.

    ``foreign [tokens, rows]`` is true where the row is of another adapter than the token; None:
    nowhere.
    """

    start: int
    stop: int
    first: int
    last: int
    foreign: Tensor | None


@dataclass(frozen=True, kw_only=True)
class BlockCosts:
    """What a block costs, measured in floating-point operations.

    Args:
        width: ``in + out`` of the mean module.
        call_flops: what the device computes in the time of one block's three kernel calls.
    """

    width: float
    call_flops: float

    @staticmethod
    def of(shapes: Sequence[tuple[int, int]], device: torch.device) -> BlockCosts:
        """8 us a block; 80 GFLOP/s on a core, 20 TFLOP/s on an accelerator."""
        width = sum(out + inner for out, inner in shapes) / max(1, len(shapes))
        return BlockCosts(width=width, call_flops=8e-6 * (80e9 if device.type == "cpu" else 2e13))

    def of_block(self, tokens: int, rows: int) -> float:
        return self.call_flops + 2 * tokens * rows * self.width


def plan_blocks(
    segments: Sequence[Segment], costs: BlockCosts, device: torch.device
) -> list[Block]:
    """Blocks of ``segments``, which are in the order of their tokens.

    Neighbours share a block only where their arena rows are in order too.
    """
    groups: list[list[Segment]] = []
    for segment in segments:
        group = groups[-1] if groups else None
        if group is not None and _joins(group, segment, costs):
            group.append(segment)
        else:
            groups.append([segment])
    return [_block(group, device) for group in groups]


def _joins(group: Sequence[Segment], new: Segment, costs: BlockCosts) -> bool:
    """Whether one block of ``group`` and ``new`` is cheaper than a block of each."""
    first, last = group[0], group[-1]
    if new.start != last.stop or new.rows.start < last.rows.start:
        return False
    apart = costs.of_block(last.stop - first.start, last.rows.stop - first.rows.start)
    apart += costs.of_block(new.stop - new.start, len(new.rows))
    return costs.of_block(new.stop - first.start, new.rows.stop - first.rows.start) <= apart


def _block(group: Sequence[Segment], device: torch.device) -> Block:
    start, first, last = group[0].start, group[0].rows.start, group[-1].rows.stop
    foreign = None
    if any(segment.rows != group[0].rows for segment in group):
        host = torch.ones(group[-1].stop - start, last - first, dtype=torch.bool)
        for s in group:
            host[s.start - start : s.stop - start, s.rows.start - first : s.rows.stop - first] = 0
        foreign = host.to(device, non_blocking=True)
    return Block(start=start, stop=group[-1].stop, first=first, last=last, foreign=foreign)
