"""One LoRA layer with K slots over one frozen linear: 1 on a device, a cohort in simulation.

Rows of a batch are slot-major: ``[K * b, T, in]``, b rows of each slot. With slots of unequal rank
the factors are zero-padded to the largest, ``A [K, R, in]`` and ``B [K, out, R]``:

    y_k = x_k W^T + s_k (drop(x_k) A_k^T) B_k^T  [+ c_k (x_k P_k^T) Q_k^T, the carried factors]

A padded row of A meets a padded column of B, both zero, so both gradients are zero and stay so. On
a CPU a cohort goes through the small modules of a tiny base as ``W_k = W + s_k B_k A_k``, one
product instead of three and their sum: there the passes over memory cost more than the larger
gradient. The frozen linear is any module that maps ``[..., in]`` to ``[..., out]``: ``nn.Linear``,
GPT-2's ``Conv1D``, bitsandbytes' ``Linear4bit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flexlora.lora.adapters import LoRAFactors
from flexlora.seeds import derive_seed

__all__ = [
    "DropoutStream",
    "GradientObserver",
    "LoRALinear",
    "PassShape",
    "SlotFactors",
    "low_rank_cost",
]


@dataclass(kw_only=True)
class PassShape:
    """Rows and width of the batch ``[rows, width]`` in the model, known to all of its layers.

    0 rows: a layer that is called outside a pass of its model.
    """

    rows: int = 0
    width: int = 0

    def check(self, name: str, x: Tensor, num_slots: int) -> None:
        """Refuse inputs whose rows are not those of the batch, slot by slot.

        Raises:
            ValueError: neither ``[rows, ...]`` nor ``[rows * width, ...]``, or rows that the
                slots do not share equally.
        """
        rows = self.rows or x.shape[0]
        if x.shape[0] in (rows, rows * self.width) and rows % num_slots == 0:
            return
        raise ValueError(
            f"module '{name}': its input has shape {tuple(x.shape)}, expected {rows} rows, or "
            f"{rows * self.width} tokens, in the order of {num_slots} slots. Does the model sort "
            "or drop tokens before it? Leave it out of lora.target-modules."
        )


@dataclass(frozen=True, kw_only=True)
class DropoutStream:
    """Seed and shapes of a slot's dropout masks in one pass.

    The mask of a module is a function of (seed, module) and drawn for ``[rows, length, in]``, so a
    slot has the same mask alone, in a cohort and in a recomputed layer.
    """

    seed: int
    rows: int
    length: int
    padded_length: int


def low_rank_cost(
    rows: int, in_features: int, out_features: int, rank: int, carried_rank: int = 0
) -> tuple[float, float]:
    """Nanoseconds on one core for a slot's ``rows``, beyond the frozen product: two ways.

    First by the factors: passes over the input and output, and narrow products. Then by ``W + s B
    A``: a gradient ``[out, in]`` and the sum itself. The rates were measured; only which of the two
    is smaller matters.
    """
    passes = 1.9 + 0.04 * rank
    if carried_rank:
        passes += 1.0 + 0.027 * carried_rank
    size = in_features * out_features
    by_factors = rows * (in_features + out_features) * passes
    return by_factors, 1.1 * rows * size * 0.02 + 6 * size * rank * 0.02


@dataclass(kw_only=True, eq=False)
class SlotFactors:
    """``A [K, R, in]``, ``B [K, out, R]``, ``scaling [K, 1, 1]``; K = 1 applies to all rows."""

    A: Tensor
    B: Tensor
    scaling: Tensor

    def apply(self, x: Tensor, num_slots: int) -> Tensor:
        """``s_k (x_k A_k^T) B_k^T`` of ``x [K' * b, T, in]`` or ``[K' * b * T, in]``, K' <= K."""
        if self.A.shape[0] == 1:
            A, B = self.A[0].to(x.dtype), self.B[0].to(x.dtype)
            return ((x @ A.T) * self.scaling[0]) @ B.T
        by_slot = x.reshape(num_slots, -1, x.shape[-1])
        A, B = self.A[:num_slots].to(x.dtype), self.B[:num_slots].to(x.dtype)
        scaling = self.scaling[:num_slots]
        hidden = torch.matmul(by_slot, A.transpose(1, 2))
        return torch.matmul(hidden * scaling, B.transpose(1, 2)).reshape(*x.shape[:-1], -1)

    @staticmethod
    def stack(
        slots: Sequence[LoRAFactors],
        like: Tensor,
        *,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
    ) -> SlotFactors:
        """Factors of K slots, zero-padded to their largest rank, on ``like``'s device.

        ``lora_A`` and ``lora_B`` are taken as they are where given, else copied and frozen.
        """
        K, R = len(slots), max(f.rank for f in slots)
        shape_A, shape_B = (K, R, slots[0].in_features), (K, slots[0].out_features, R)
        A = _padded([f.lora_A for f in slots], shape_A, like) if lora_A is None else lora_A
        B = _padded([f.lora_B for f in slots], shape_B, like) if lora_B is None else lora_B
        wide = torch.promote_types(A.dtype, torch.float32)
        scaling = torch.tensor([f.scaling for f in slots], dtype=wide, device=A.device)
        return SlotFactors(A=A, B=B, scaling=scaling[:, None, None])


def fill(places: Tensor, factors: Sequence[Tensor]) -> None:
    """Copy each slot's factor into the first rows and columns of ``places[k]``."""
    for place, factor in zip(places, factors, strict=True):
        place[: factor.shape[0], : factor.shape[1]] = factor


def _padded(factors: Sequence[Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The factors of all slots on ``like``'s device, padded on the host: one copy, not K."""
    host = torch.zeros(shape, dtype=like.dtype)
    fill(host, factors)
    return host.to(like.device)


class _SlotLinear(torch.autograd.Function):
    """``x_k (W_k + s_k B_k A_k)^T + bias`` of ``x [K, b * T, in]``, one product a slot.

    Backward: ``dB = s (g^T x) A^T`` and ``dA = s B^T (g^T x)`` come from one ``[out, in]``
    matrix per slot. The output is no view: a model may change it in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        K = A.shape[0]
        weights = torch.baddbmm(weight.expand(K, -1, -1), B * scaling, A)
        out = torch.bmm(x, weights.mT)
        if bias is not None:
            out += bias
        ctx.save_for_backward(x, A, B, scaling, weights)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        x, A, B, scaling, weights = ctx.saved_tensors
        (g,) = gradients
        to_x = to_A = to_B = None
        if ctx.needs_input_grad[0]:
            to_x = torch.bmm(g, weights)
        if any(ctx.needs_input_grad[1:3]):
            to_weight = torch.bmm(g.mT, x).mul_(scaling)
            to_A = torch.bmm(B.mT, to_weight) if ctx.needs_input_grad[1] else None
            to_B = torch.bmm(to_weight, A.mT) if ctx.needs_input_grad[2] else None
        return to_x, to_A, to_B, None, None, None


class GradientObserver(Protocol):
    """Gets the input and the output's gradient of a module in every backward pass."""

    # A number whose gradient is asked for in place of the factors': it is zero, and the backward
    # pass comes by every module on the way to it. None where the factors' gradients are asked for.
    anchor: Tensor | None

    def add(self, x: Tensor, gradient: Tensor, num_slots: int) -> None:
        """``x [K * b, T, in]`` or ``[K * b * T, in]``, and ``gradient`` with ``out`` columns."""


class _Observed(torch.autograd.Function):
    """A copy of ``out``; backward gives its gradient and ``x`` to the observer.

    ``x`` is saved by autograd, so checkpointing can drop and recompute it; a hook's closure would
    keep it in memory through the whole pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        anchor: Tensor | None,
        observer: GradientObserver,
        num_slots: int,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.observer, ctx.num_slots = observer, num_slots
        return out.clone()  # not a view: a model may change it in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        ctx.observer.add(*ctx.saved_tensors, gradient, ctx.num_slots)
        return gradient, None, None, None, None


class LoRALinear(nn.Module):
    """A frozen linear plus the factors of K slots; without slots the linear alone."""

    def __init__(self, base: nn.Module, *, name: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base = base
        self.name, self.in_features, self.out_features = name, in_features, out_features
        self.num_slots = 0
        self.trained: SlotFactors | None = None
        self.carried: SlotFactors | None = None
        self.merged: Tensor | None = None  # the weight with the carried factors added in
        self.slot_weights: Tensor | None = None  # [1 or K, out, in], made in the first pass
        self.dropout = 0.0
        self.streams: tuple[DropoutStream | None, ...] = ()
        self.observer: GradientObserver | None = None
        self.pass_shape = PassShape()
        self.training = base.training

    @property
    def weight(self) -> Any:
        """The frozen weight; models read its dtype. ``trial_pass`` finds those that multiply it."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.num_slots:
            self.pass_shape.check(self.name, x, self.num_slots)
        if self._one_product(x):
            return self._observed(self._slot_linear(x), x)
        out = self.base(x, *args, **kwargs) if self.merged is None else self._merged(x)
        if self.num_slots == 0:
            return out
        for factors in (self.trained, self.carried):
            if factors is not None:
                inputs = x.to(torch.promote_types(factors.A.dtype, torch.float32))
                if factors is self.trained and self.dropout > 0 and self.streams:
                    inputs = inputs * self._mask(inputs)
                out = out + factors.apply(inputs, self.num_slots).to(out.dtype)
        return self._observed(out, x)

    def _observed(self, out: Tensor, x: Tensor) -> Tensor:
        observer = self.observer
        if observer is None or not out.requires_grad:
            return out
        return _Observed.apply(out, x, observer.anchor, observer, self.num_slots)

    def _one_product(self, x: Tensor) -> bool:
        """Whether ``x W_k^T`` with ``W_k = W + s_k B_k A_k`` is possible and cheaper here."""
        trained, weight = self.trained, self.base.weight
        if self.num_slots < 2 or trained is None:
            return False
        if (self.dropout > 0 and self.streams) or weight.requires_grad:
            return False
        plain = type(self.base).__name__ in ("Linear", "Conv1D") and x.device.type == "cpu"
        exact = weight.dtype in (torch.float32, torch.float64)
        if not (plain and exact and x.dtype == weight.dtype == trained.A.dtype):
            return False
        rows = x.numel() // (self.in_features * self.num_slots)
        carried = self.carried.A.shape[1] if self.carried is not None else 0
        by_factors, by_weight = low_rank_cost(
            rows, self.in_features, self.out_features, trained.A.shape[1], carried
        )
        return by_weight < by_factors

    def _slot_linear(self, x: Tensor) -> Tensor:
        trained, base = self.trained, self.base
        assert trained is not None
        if self.slot_weights is None:
            self.slot_weights = self._frozen_weights()
        count = min(self.num_slots, trained.A.shape[0])
        weight = self.slot_weights if self.slot_weights.shape[0] == 1 else self.slot_weights[:count]
        A, B, scaling = trained.A[:count], trained.B[:count], trained.scaling[:count]
        by_slot = x.reshape(count, -1, x.shape[-1])
        out = _SlotLinear.apply(by_slot, A, B, scaling, weight, base.bias)
        return out.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def _frozen_weights(self) -> Tensor:
        """``[1 or K, out, in]``: the weight plus each slot's carried factors, added in float64."""
        base: Any = self.base
        weight: Tensor = base.weight if self.merged is None else self.merged
        weight = weight.T if type(base).__name__ == "Conv1D" else weight
        if self.carried is None:
            return weight[None]
        A, B, scaling = (x.double() for x in vars(self.carried).values())
        return torch.baddbmm(weight.double().expand(len(A), -1, -1), B * scaling, A).to(weight)

    def merge(self, factors: LoRAFactors) -> bool:
        """Add ``factors`` into a copy of a float weight; False where the base is quantized."""
        weight, kind = self.base.weight, type(self.base).__name__
        if kind not in ("Linear", "Conv1D") or not isinstance(weight, Tensor):
            return False
        delta = factors.map(lambda t: t.to(weight.device, torch.float64)).delta_weight()
        delta = delta.T if kind == "Conv1D" else delta
        self.merged = (weight.detach().double() + delta).to(weight.dtype)
        return True

    def _merged(self, x: Tensor) -> Tensor:
        base: Any = self.base
        assert self.merged is not None
        weight = self.merged.T if type(base).__name__ == "Conv1D" else self.merged
        return nn.functional.linear(x, weight, base.bias)

    def _mask(self, x: Tensor) -> Tensor:
        """Inverted dropout in the shape of ``x``, 0 or 1/(1-p); padding gets 0."""
        streams = self.streams[: self.num_slots]
        padded_length = next(stream.padded_length for stream in streams if stream is not None)
        mask = x.new_zeros(self.num_slots, x.numel() // (self.num_slots * self.in_features), 1)
        mask = mask.reshape(self.num_slots, -1, padded_length, 1).repeat(1, 1, 1, self.in_features)
        for k, stream in enumerate(streams):
            if stream is None:
                continue
            generator = torch.Generator(x.device).manual_seed(derive_seed(stream.seed, self.name))
            shape = (stream.rows, stream.length, self.in_features)
            keep = torch.rand(shape, generator=generator, device=x.device) >= self.dropout
            mask[k, : stream.rows, : stream.length] = keep.to(x.dtype)
        return mask.reshape(x.shape) / (1.0 - self.dropout)
