"""What the attention of one step does: who attends over what, in as few calls as possible.

- The keys and values of all tokens are written into their slots (``kv_cache.py``).
- Decoding tokens attend over their slots, all of a pool in one call.
- Whole prompts attend over themselves, those of similar length in one call.
- A later part of a long prompt attends over its slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexlora.serving.kv_cache import Pool, Slot

__all__ = ["AttentionPass", "DecodeGroup", "PromptGroup", "Span", "plan_attention"]

Write = tuple[Pool, Tensor | None, Tensor]  # which tokens (None: all) go to which rows of a pool


@dataclass(frozen=True, kw_only=True)
class Span:
    """``count`` tokens of one request at position ``start`` of the step, after ``past`` others."""

    start: int
    count: int
    past: int
    slot: Slot


@dataclass(kw_only=True, eq=False)
class DecodeGroup:
    """The tokens that attend over ``longest`` columns of the slots of a pool.

    ``rows`` are positions in the step by slot; ``live`` the slots that decode, None for all.
    """

    pool: Pool
    rows: Tensor
    live: Tensor | None
    lengths: list[int]
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """``[slots, 1, 1, longest]``, minus infinity where a slot has no key in the window."""
        if window not in self.masks:
            self.masks[window] = self._mask(window, dtype)
        return self.masks[window]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if min(self.lengths) == self.longest and (window is None or window >= self.longest):
            return None
        lengths = torch.tensor(self.lengths)[:, None]
        columns = torch.arange(self.longest)
        hidden = columns >= lengths
        if window is not None:
            hidden |= columns < lengths - window
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        return mask[:, None, None].to(self.rows.device)


@dataclass(kw_only=True, eq=False)
class PromptGroup:
    """Whole prompts: ``index [prompts, longest]`` are positions in the step, the last repeated.

    ``inside`` are the places of real tokens in it, flat, and ``rows`` their positions in the step.
    """

    index: Tensor
    inside: Tensor
    rows: Tensor


@dataclass(kw_only=True, eq=False)
class AttentionPass:
    """What the attention of one step does, equal in all layers but for windows."""

    tokens: int
    writes: list[Write]
    decodes: list[DecodeGroup]
    prompts: list[PromptGroup]
    parts: list[Span]
    seen: dict[int, dict[str, Any]] | None = None  # by layer, what the model gave: of a trial


def plan_attention(spans: Sequence[Span], device: torch.device) -> AttentionPass:
    """The plan of ``spans``: in order, without gaps, those of one decoding token first."""
    decoding = [s for s in spans if s.count == 1 and s.past]
    whole = [s for s in spans if not s.past]
    return AttentionPass(
        tokens=sum(s.count for s in spans),
        writes=_writes(spans, device),
        decodes=_decodes(decoding, device),
        prompts=[_prompts(group, device) for group in _alike(whole)],
        parts=[s for s in spans if s.past and s.count > 1],
    )


def _by_pool(spans: Sequence[Span]) -> dict[Pool, list[Span]]:
    pools: dict[Pool, list[Span]] = {}
    for span in spans:
        pools.setdefault(span.slot.pool, []).append(span)
    return pools


def _writes(spans: Sequence[Span], device: torch.device) -> list[Write]:
    pools, found = _by_pool(spans), list[Write]()
    for pool, of_pool in pools.items():
        sources, targets = list[int](), list[int]()
        for s in of_pool:
            first = s.slot.index * pool.capacity + s.past
            sources += range(s.start, s.start + s.count)
            targets += range(first, first + s.count)
        chosen = None if len(pools) == 1 else torch.tensor(sources, device=device)
        found.append((pool, chosen, torch.tensor(targets, device=device)))
    return found


def _decodes(spans: Sequence[Span], device: torch.device) -> list[DecodeGroup]:
    found = []
    for pool, of_pool in _by_pool(spans).items():
        rows, lengths = [of_pool[0].start] * len(pool.slots), [1] * len(pool.slots)
        for s in of_pool:
            rows[s.slot.index], lengths[s.slot.index] = s.start, s.past + 1
        live = None
        if len(of_pool) < len(pool.slots):
            live = torch.tensor(sorted(s.slot.index for s in of_pool), device=device)
        decode = DecodeGroup(
            pool=pool,
            rows=torch.tensor(rows, device=device),
            live=live,
            lengths=lengths,
        )
        found.append(decode)
    return found


def _alike(whole: Sequence[Span]) -> Iterator[list[Span]]:
    """Prompts in groups whose padding is at most a half of them."""
    group: list[Span] = []
    for span in sorted(whole, key=lambda s: -s.count):
        if group and 2 * span.count < group[0].count:
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _prompts(group: Sequence[Span], device: torch.device) -> PromptGroup:
    longest = group[0].count
    index, inside, rows = [], list[int](), list[int]()
    for at, s in enumerate(group):
        own = list(range(s.start, s.start + s.count))
        index.append(own + [own[-1]] * (longest - s.count))
        inside += range(at * longest, at * longest + s.count)
        rows += own
    return PromptGroup(
        index=torch.tensor(index, device=device),
        inside=torch.tensor(inside, device=device),
        rows=torch.tensor(rows, device=device),
    )
