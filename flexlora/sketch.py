"""The row space of a gradient that is never stored: ``(Psi g') x`` instead of ``g'^T x``.

For ``y = x W^T`` the gradient of a module's weight is ``dL/dW = g'^T x`` with ``x [n, in]`` its
inputs and ``g' [n, out]`` the gradient of its outputs. A random ``Psi [k, out]`` keeps its row
space: ``Psi dL/dW = (g' Psi^T)^T x [k, in]``, accumulated module by module in the backward pass, so
the memory is ``k x in`` and never ``out x in`` (Halko, Martinsson and Tropp, 2011, section 4). It
needs no gradient of ``W`` itself and so works over 4-bit weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora.seeds import generator

__all__ = ["GradientSketch", "sketch_size", "top_rows"]


def sketch_size(rank: int, out_features: int) -> int:
    """Rows of the sketch for a wanted rank: four times as many and 16, at most ``out_features``."""
    return min(4 * rank + 16, out_features)


class GradientSketch:
    """``Psi dL_k/dW`` of one module for K slots, ``[K, k, in]``.

    ``Psi`` depends on the seed and the module's name only, and its rows are nested, so a slot sees
    the same sketch alone and in a cohort.
    """

    def __init__(self, *, name: str, ranks: list[int], out_features: int, seed: int) -> None:
        self.sizes = [sketch_size(rank, out_features) for rank in ranks]
        rows = generator(seed, "sketch", name)
        uniform = torch.rand(max(self.sizes), out_features, generator=rows, dtype=torch.float64)
        # Signs rather than normals: torch draws normals in blocks, which are not nested.
        self.Psi = torch.where(uniform < 0.5, -1.0, 1.0).double()
        self.total: Tensor | None = None

    def add(self, x: Tensor, gradient: Tensor, num_slots: int) -> None:
        """Fold in inputs ``x [K * n, in]`` and output gradients ``[K * n, out]``, slot-major."""
        inputs = x.detach().reshape(num_slots, -1, x.shape[-1])
        outputs = gradient.detach().reshape(num_slots, -1, gradient.shape[-1])
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        Psi = self.Psi.to(outputs.device, dtype)
        part = (outputs.to(dtype) @ Psi.T).transpose(1, 2) @ inputs.to(dtype)
        self.total = part if self.total is None else self.total + part


def top_rows(sketch: Tensor, rank: int, fallback: Tensor) -> Tensor:
    """The top ``rank`` right singular vectors of ``sketch [k, in]`` as rows ``[rank, in]``.

    They are scaled to the length that random rows have on average, so that a learning rate means
    the same for both. Directions that the gradient does not have are taken from ``fallback``.
    """
    _, S, Vh = torch.linalg.svd(sketch.double(), full_matrices=False)
    live = int((1e-6 * S[0] < S).sum()) if S.numel() and float(S[0]) > 0 else 0
    rows = fallback.clone()
    taken = min(rank, live)
    # Entries uniform in +-1/sqrt(in) give a row the squared length 1/3 on average.
    rows[:taken] = (Vh[:taken] / 3.0**0.5).to(rows.dtype)
    return rows
