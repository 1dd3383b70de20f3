"""Causal attention of narrow heads on a CPU, exact; tiny bases spend a third of a step in it.

    O = P V,  P = softmax(s Q K^T + causal),   dS = P * (dO V^T - rowsum(dO * O))

torch's fused kernel multiplies blocks by heads of 4 or 8 numbers at a fraction of what the machine
can do: narrow outputs are slow. Here every narrow product is written transposed (``V^T P^T`` for
``P V``), a few heads at a time so that their scores stay in the cache, and queries go in strips, so
that most of what the causal mask would throw away is never computed. The identities are those of
FlashAttention (arXiv 2205.14135). ``P`` is kept for the way back while it is small, else made anew.

Wider heads, masks, dropout, half precision and CUDA go to torch's ``sdpa``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["WIDEST_HEAD", "causal_attention", "prefer_narrow", "suits"]

NAME = "flexlora_narrow"  # under which transformers finds it
WIDEST_HEAD = 8  # measured: half the time of the fused kernel at 8, nine tenths at 16
CHUNK_SCORES = 1 << 18  # of P at a time: 1 MB of float32, a usual second-level cache
KEPT_SCORES = 1 << 23  # of P kept for the way back: 32 MB of float32 a layer
SHORTEST_STRIP = 32  # queries


def suits(query: Tensor, key: Tensor) -> bool:
    """Whether ``causal_attention`` is for these ``[rows, heads, T, d]``."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and query.shape[-1] <= WIDEST_HEAD
        and query.shape[2] == key.shape[2] > 1
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``[rows, heads, T, d]`` of queries over keys and values ``[rows, key heads, T, d]``.

    Heads that share a key head (grouped-query attention) follow one another, as in transformers.
    The result lies in memory as ``[rows, T, heads, d]``. Once differentiable.
    """
    return _CausalAttention.apply(query, key, value, scale)


def prefer_narrow(model: Any) -> bool:
    """Let ``model`` attend in this way where its heads are narrow and it has fused attention."""
    config, interface = model.config, "_attn_implementation"
    heads = getattr(config, "num_attention_heads", 0)
    hidden = getattr(config, "hidden_size", 0)
    size = getattr(config, "head_dim", None) or (hidden // heads if heads else 0)
    if getattr(config, interface, "") != "sdpa" or not 0 < size <= WIDEST_HEAD:
        return False
    _register()
    model.set_attn_implementation(NAME)
    return True


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; whatever this file does not do is left to ``sdpa``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    odd = any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if attention_mask is None and causal and not odd and not dropout and suits(query, key):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, scale).transpose(1, 2), None
    options |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        heads = _Heads.of(query, key)
        queries = heads.by_key_head(query) * scale
        keys, values = heads.turned(key), heads.turned(value)
        out = query.new_empty(heads.rows, heads.length, heads.queries, heads.size)
        keeps = any(ctx.needs_input_grad) and heads.scores <= KEPT_SCORES
        kept, masks = [], heads.masks(query)
        for some, rows, strip in heads.parts():
            P = _probabilities(heads.strip(queries[some], strip), keys[some], strip, masks)
            kept += [P] if keeps else []
            heads.put(out, rows, strip, torch.bmm(values[some, :, : strip.stop], P.mT))
        ctx.save_for_backward(queries, keys, values, out, *kept)
        ctx.heads, ctx.scale = heads, scale
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        queries, keys, values, out, *kept = ctx.saved_tensors
        heads, gradient = ctx.heads, gradients[0]
        # Rowsums of dO * O, one per query: what the softmax's own gradient subtracts.
        sums = (gradient.transpose(1, 2) * out).sum(-1, keepdim=True).transpose(1, 2)
        sums, given = heads.by_key_head(sums), heads.by_key_head(gradient)
        masks = [] if kept else heads.masks(queries)
        to_queries = torch.empty_like(out)
        to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
        for number, (some, rows, strip) in enumerate(heads.parts()):
            seen = slice(0, strip.stop)
            q, g = heads.strip(queries[some], strip), heads.strip(given[some], strip)
            P = kept[number] if kept else _probabilities(q, keys[some], strip, masks)
            to_values[some, :, seen] += torch.bmm(g.mT, P)
            dS = torch.baddbmm(heads.strip(sums[some], strip), g, values[some, :, seen], beta=-1)
            dS.mul_(P)
            to_keys[some, :, seen] += torch.bmm(q.mT, dS)
            heads.put(to_queries, rows, strip, torch.bmm(keys[some, :, seen], dS.mT))
        to_queries.mul_(ctx.scale)
        turned = (heads.unturned(x) for x in (to_keys, to_values))
        return to_queries.transpose(1, 2), *turned, None


def _probabilities(queries: Tensor, keys: Tensor, strip: slice, masks: Sequence[Tensor]) -> Tensor:
    """``P [n, group * t, keys]`` of one strip: keys up to the strip's last query."""
    mask = masks[strip.start // max(1, masks[0].shape[1])]
    return torch.softmax(torch.baddbmm(mask, queries, keys[:, :, : strip.stop]), dim=-1)


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """The shapes: ``keys`` key heads a row, each met by ``queries / keys`` query heads."""

    rows: int
    queries: int
    keys: int
    length: int
    size: int

    @staticmethod
    def of(query: Tensor, key: Tensor) -> _Heads:
        rows, queries, length, size = query.shape
        return _Heads(rows=rows, queries=queries, keys=key.shape[1], length=length, size=size)

    @property
    def group(self) -> int:
        return self.queries // self.keys

    @property
    def strips(self) -> list[slice]:
        step = max(SHORTEST_STRIP, -(-self.length // 4))
        return [slice(at, min(at + step, self.length)) for at in range(0, self.length, step)]

    @property
    def scores(self) -> int:
        """Numbers of ``P`` in all strips."""
        return self.rows * self.queries * sum((s.stop - s.start) * s.stop for s in self.strips)

    def masks(self, like: Tensor) -> list[Tensor]:
        """``[group * t, keys]`` of each strip: 0 where a query may look, else minus infinity."""
        masks = []
        for strip in self.strips:
            shape = (strip.stop - strip.start, strip.stop)
            hidden = torch.ones(shape, dtype=torch.bool).triu(strip.start + 1)
            mask = like.new_zeros(shape).masked_fill_(hidden, float("-inf"))
            masks.append(mask.repeat(self.group, 1))
        return masks

    def parts(self) -> Iterator[tuple[slice, slice, slice]]:
        """Key heads of some rows, those rows, and a strip of their queries."""
        strips = self.strips
        a_row = self.queries * (strips[0].stop - strips[0].start) * self.length
        some = max(1, CHUNK_SCORES // a_row)
        for at in range(0, self.rows, some):
            rows = slice(at, min(at + some, self.rows))
            for strip in strips:
                yield slice(rows.start * self.keys, rows.stop * self.keys), rows, strip

    def by_key_head(self, x: Tensor) -> Tensor:
        """``[rows, heads, T, d]`` as ``[rows * key heads, group, T, d]``."""
        return x.reshape(self.rows * self.keys, self.group, self.length, x.shape[-1])

    def turned(self, x: Tensor) -> Tensor:
        """``[rows, key heads, T, d]`` as ``[rows * key heads, d, T]``."""
        return x.transpose(2, 3).reshape(self.rows * self.keys, self.size, self.length)

    def unturned(self, x: Tensor) -> Tensor:
        return x.view(self.rows, self.keys, self.size, self.length).transpose(2, 3)

    def strip(self, x: Tensor, strip: slice) -> Tensor:
        """Queries of a strip, those of a group one after the other, ``[n, group * t, d]``."""
        return x[:, :, strip].reshape(x.shape[0], -1, x.shape[-1])

    def put(self, into: Tensor, rows: slice, strip: slice, x: Tensor) -> None:
        """``x [n, d, group * t]`` to its place in ``into [rows, T, heads, d]``."""
        length = strip.stop - strip.start
        place = into[rows, strip].unflatten(2, (self.keys, self.group))
        parts = x.view(-1, self.keys, self.size, self.group, length)
        place.copy_(parts.permute(0, 4, 1, 3, 2))
