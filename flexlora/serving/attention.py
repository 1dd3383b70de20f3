"""Attention of packed requests over their slots, as an attention function of transformers.

A step's input is one row ``[1, N]``: the newest token of every running answer, then parts of
prompts, without padding. All but attention is a function of each token alone, so transformers' own
forward computes it. Attention comes here (transformers' ``AttentionInterface``), with the keys and
values of all N tokens, and follows the step's plan (``attention_plan.py``).

transformers' own paged attention packs tokens too, but on a CPU computes the scores of all tokens
with all keys of all requests, and masks them: 64 times the work for 64 requests.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexlora.serving.attention_plan import AttentionPass, DecodeGroup, PromptGroup, Span

__all__ = ["NAME", "attention_of", "running"]

NAME = "flexlora_serving"
_current = threading.local()


@contextmanager
def running(step: AttentionPass) -> Iterator[None]:
    """Inside the block, this thread's forward passes are ``step``."""
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


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


def _decode(decode: DecodeGroup, layer: int, q: Tensor, out: Tensor, attend: _Attend) -> None:
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
    prompts: PromptGroup, q: Tensor, k: Tensor, v: Tensor, out: Tensor, attend: _Attend
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
