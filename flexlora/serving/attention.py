"""Attention of packed requests over their slots, as an attention function of transformers.

A step's input is one row ``[1, N]``: the newest token of every running answer, then parts of
prompts, without padding. All but attention is a function of each token alone, so transformers' own
forward computes it. Attention comes here (transformers' ``AttentionInterface``), with the keys and
values of all N tokens:

- they are written into their slots (``kv_cache.py``);
- decoding tokens attend over their slots, all of a pool in one call;
- whole prompts attend over themselves, those of similar length in one call;
- a later part of a long prompt attends over its slot.

transformers' own paged attention packs tokens too, but on a CPU computes the scores of all tokens
with all keys of all requests, and masks them: 64 times the work for 64 requests.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexlora.serving.kv_cache import Pool, Slot

__all__ = ["NAME", "AttentionPass", "Span", "attention_of", "plan_attention"]

NAME = "flexlora_serving"
_current = threading.local()
_Write = tuple[Pool, Tensor | None, Tensor]  # which tokens (None: all) go to which rows of a pool


@dataclass(frozen=True, kw_only=True)
class Span:
    """``count`` tokens of one request at position ``start`` of the step, after ``past`` others."""

    start: int
    count: int
    past: int
    slot: Slot


@dataclass(kw_only=True, eq=False)
class _Decode:
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
class _Prompts:
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
    writes: list[_Write]
    decodes: list[_Decode]
    prompts: list[_Prompts]
    parts: list[Span]
    seen: dict[int, dict[str, Any]] | None = None  # by layer, what the model gave: of a trial

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block, this thread's forward passes are this step."""
        _current.step = self
        try:
            yield
        finally:
            _current.step = None


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


def _writes(spans: Sequence[Span], device: torch.device) -> list[_Write]:
    pools, found = _by_pool(spans), list[_Write]()
    for pool, of_pool in pools.items():
        sources, targets = list[int](), list[int]()
        for s in of_pool:
            first = s.slot.index * pool.capacity + s.past
            sources += range(s.start, s.start + s.count)
            targets += range(first, first + s.count)
        chosen = None if len(pools) == 1 else torch.tensor(sources, device=device)
        found.append((pool, chosen, torch.tensor(targets, device=device)))
    return found


def _decodes(spans: Sequence[Span], device: torch.device) -> list[_Decode]:
    found = []
    for pool, of_pool in _by_pool(spans).items():
        rows, lengths = [of_pool[0].start] * len(pool.slots), [1] * len(pool.slots)
        for s in of_pool:
            rows[s.slot.index], lengths[s.slot.index] = s.start, s.past + 1
        live = None
        if len(of_pool) < len(pool.slots):
            live = torch.tensor(sorted(s.slot.index for s in of_pool), device=device)
        decode = _Decode(
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


def _prompts(group: Sequence[Span], device: torch.device) -> _Prompts:
    longest = group[0].count
    index, inside, rows = [], list[int](), list[int]()
    for at, s in enumerate(group):
        own = list(range(s.start, s.start + s.count))
        index.append(own + [own[-1]] * (longest - s.count))
        inside += range(at * longest, at * longest + s.count)
        rows += own
    return _Prompts(
        index=torch.tensor(index, device=device),
        inside=torch.tensor(inside, device=device),
        rows=torch.tensor(rows, device=device),
    )


def attention_of(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``[1, N, heads, width]`` of ``query [1, heads, N, width]`` and its keys and values.

    Raises:
        RuntimeError: outside a step.
    """
    step: AttentionPass | None = getattr(_current, "step", None)
    if step is None:
        raise RuntimeError("the attention of flexlora serve was called outside a step.")
    layer = module.layer_idx
    if step.seen is not None:
        step.seen[layer] = {"key": key, "value": value, "window": sliding_window, **kwargs}
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, width]
    if step.seen is None:
        for pool, chosen, rows in step.writes:
            pool.keys[layer].index_copy_(0, rows, k if chosen is None else k[chosen])
            pool.values[layer].index_copy_(0, rows, v if chosen is None else v[chosen])
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    attend = _Attend(scaling=scaling, softcap=softcap, window=sliding_window, sinks=s_aux)
    for decode in step.decodes:
        _decode(decode, layer, q, out, attend)
    for prompts in step.prompts:
        _whole(prompts, q, k, v, out, attend)
    for span in step.parts:
        _part(span, layer, q, out, attend)
    return out[None], None


@dataclass(frozen=True, kw_only=True)
class _Attend:
    """``softmax(scaling * q k^T + mask) v``, with what some models add to the scores.

    ``softcap`` limits them (Gemma 2); ``sinks [heads]`` are scores of a key without a value
    (gpt-oss).
    """

    scaling: float | None
    softcap: float | None
    window: int | None
    sinks: Tensor | None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = False
    ) -> Tensor:
        """Of ``q [rows, heads, T, width]``, ``k`` and ``v`` with equal or fewer heads.

        The query heads of one key head may be its T instead (decoding).
        """
        if self.softcap is None and self.sinks is None:
            grouped = q.shape[1] != k.shape[1]
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=self.scaling, enable_gqa=grouped
            )
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = torch.matmul(q, k.mT) * (self.scaling or q.shape[-1] ** -0.5)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if causal:
            mask = _causal(q.shape[2], 0, None, q)
        scores = scores if mask is None else scores + mask
        if self.sinks is not None:
            sink = self.sinks.to(scores.dtype).view(1, q.shape[1], -1, 1)
            scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32)[..., : k.shape[2]]
        return torch.matmul(weights.to(q.dtype), v)


def _causal(count: int, past: int, window: int | None, like: Tensor) -> Tensor:
    """``[count, past + count]``: minus infinity after a token and before its window."""
    at = torch.arange(past, past + count, device=like.device)[:, None]
    columns = torch.arange(past + count, device=like.device)
    hidden = columns > at
    if window is not None:
        hidden |= columns <= at - window
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, -torch.inf)


def _decode(decode: _Decode, layer: int, q: Tensor, out: Tensor, attend: _Attend) -> None:
    """One token of each slot; the query heads that share a key head are its query rows."""
    pool, count = decode.pool, len(decode.rows)
    k, v = (
        held[layer].view(-1, pool.capacity, *held[layer].shape[1:])[:count, : decode.longest]
        for held in (pool.keys, pool.values)
    )
    rows = q.index_select(0, decode.rows).view(count, k.shape[2], -1, q.shape[-1])
    found = attend(rows, k.transpose(1, 2), v.transpose(1, 2), decode.mask(attend.window, q.dtype))
    found, places = found.reshape(count, out.shape[1], -1), decode.rows
    if decode.live is not None:
        found, places = found.index_select(0, decode.live), places.index_select(0, decode.live)
    out.index_copy_(0, places, found)


def _whole(
    prompts: _Prompts, q: Tensor, k: Tensor, v: Tensor, out: Tensor, attend: _Attend
) -> None:
    """Prompts over themselves; padding is on the right, where no token looks."""
    q, k, v = (x[prompts.index].transpose(1, 2) for x in (q, k, v))
    count, mask = q.shape[2], None
    if attend.window is not None and attend.window < count:
        mask = _causal(count, 0, attend.window, q)
    found = attend(q, k, v, mask, causal=mask is None)
    found = found.transpose(1, 2).reshape(-1, *out.shape[1:])
    out.index_copy_(0, prompts.rows, found.index_select(0, prompts.inside))


def _part(span: Span, layer: int, q: Tensor, out: Tensor, attend: _Attend) -> None:
    """A later part of a prompt over all before it and itself."""
    pool, stop = span.slot.pool, span.start + span.count
    first = span.slot.index * pool.capacity
    k, v = (
        held[layer][first : first + span.past + span.count].transpose(0, 1)[None]
        for held in (pool.keys, pool.values)
    )
    mask = _causal(span.count, span.past, attend.window, q)
    found = attend(q[span.start : stop].transpose(0, 1)[None], k, v, mask)
    out[span.start : stop] = found[0].transpose(0, 1)
