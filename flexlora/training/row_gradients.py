"""The gradient of every row of a pass by itself, in one backward pass.

For one row with inputs ``x [T, in]`` and output gradients ``g [T, out]`` of a LoRA layer
``y = x W^T + s (x A^T) B^T``

    dL/dB = s g^T (x A^T)   [out, R]            dL/dA = (s g B)^T x   [R, in]

As many multiplications as the gradient of the whole pass, which is their sum. So rows are recorded
and that sum is not computed: the backward pass is asked for the gradient of an ``anchor`` alone,
and no weight or factor gets one. Norms by Gram matrices of tokens ("ghost clipping", Li et al.
2022, arXiv 2110.05679, section 4) would store nothing, but take ``T^2 (out + R)`` multiplications
in place of ``T out R`` and a second backward pass: dearer for every rank below T.

Memory: P numbers a row, the size of a client's factors, for the rows of one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.training.layers import LoRALinear, SlotFactors

__all__ = ["RowGradients"]


class RowGradients:
    """Gradients of ``rows`` rows, slot-major, in a flat buffer ``[rows, P]`` as ``parameters``.

    ``spans`` are the columns of each module and trained factor.
    """

    def __init__(
        self, parameters: Tensor, *, rows: int, spans: Mapping[tuple[str, str], slice]
    ) -> None:
        self.buffer = parameters.new_zeros(rows, parameters.shape[1])
        self.anchor = parameters.new_zeros((), requires_grad=True)
        self._spans = spans

    def of(self, name: str, layer: LoRALinear) -> _ModuleRows:
        """The observer of one module."""
        assert layer.trained is not None
        places = {}
        for label in ("lora_A", "lora_B"):
            if (name, label) in self._spans:
                shape = getattr(layer.trained, label[-1]).shape[1:]
                places[label] = self.buffer[:, self._spans[name, label]].unflatten(1, shape)
        return _ModuleRows(factors=layer.trained, places=places, anchor=self.anchor)

    def backward(self, losses: Tensor) -> None:
        """Record ``d losses[i] / d factors`` of every row i; ``losses [rows]``, each of one row."""
        torch.autograd.grad(losses.sum(), self.anchor, materialize_grads=True)

    @torch.no_grad()
    def clipped_sum(self, clip: float, num_slots: int) -> Tensor:
        """``sum_i g_i min(1, clip / |g_i|)`` over the rows of each slot, ``[K, P]``.

        The norm is over all trained factors of a row. A row whose gradient is not finite adds
        nothing: whatever it holds, its influence is at most ``clip``.
        """
        norms = torch.linalg.vector_norm(self.buffer, dim=1)
        finite = torch.isfinite(norms)
        self.buffer[~finite] = 0.0
        weights = torch.where(finite, (clip / norms).clamp(max=1.0), 0.0)
        by_slot = self.buffer.unflatten(0, (num_slots, -1))
        return torch.bmm(weights.view(num_slots, 1, -1), by_slot).squeeze(1)


@dataclass(kw_only=True, eq=False)
class _ModuleRows:
    """Adds one module's gradients into ``places``, ``[rows, R, in]`` and ``[rows, out, R]``."""

    factors: SlotFactors
    places: Mapping[str, Tensor]
    anchor: Tensor | None

    def add(self, x: Tensor, gradient: Tensor, num_slots: int) -> None:
        A, B = self.factors.A[:num_slots], self.factors.B[:num_slots]
        x, g = (t.to(A.dtype).reshape(num_slots, -1, t.shape[-1]) for t in (x, gradient))
        scaling = self.factors.scaling[:num_slots].to(A.dtype)
        for label, place in self.places.items():
            # [K, b * T, out] and [K, b * T, R], or [K, b * T, R] and [K, b * T, in]
            left, right = (g, (x @ A.mT) * scaling) if label == "lora_B" else ((g @ B) * scaling, x)
            left, right = (t.reshape(len(place), -1, t.shape[-1]) for t in (left, right))
            place += left.mT @ right  # a module may be called more than once
