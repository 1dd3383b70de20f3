"""The row space of a gradient that is never stored: ``(Psi g') x`` instead of ``g'^T x``.

For ``y = x W^T`` the gradient of a module's weight is ``dL/dW = g'^T x`` with ``x [n, in]`` its
inputs and ``g' [n, out]`` the gradient of its outputs. A random ``Psi [k, out]`` keeps its row
space: ``Psi dL/dW = (g' Psi^T)^T x [k, in]``, accumulated module by module in the backward pass, so
the memory is ``k x in`` and never ``out x in``. It needs no gradient of ``W`` itself and so works
over 4-bit weights.

``Psi`` is a subsampled cosine transform with random signs (Halko, Martinsson and Tropp, 2011,
section 4.6): k rows of ``C D``, with C the orthonormal DCT-II and D a random diagonal of +-1. Its
rows are orthonormal, so ``Psi`` does not distort singular values and k = out is lossless, unlike
independent signs or normals. It is a function of k + out numbers and is computed at each use: as a
matrix it would be larger than the sketch wherever out > in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flexlora.seeds import generator

__all__ = ["GradientSketch", "sketch_size", "top_rows"]

_WIDTH = 512  # columns of Psi that exist at one time


def sketch_size(rank: int, out_features: int) -> int:
    """Rows of the sketch for a wanted rank: four times as many and 16, at most ``out_features``."""
    return min(4 * rank + 16, out_features)


class GradientSketch:
    """``Psi dL_k/dW`` of one module for K slots, ``[K, k, in]``.

    ``Psi`` depends on the seed and the module's name only, and its rows are nested, so a slot sees
    the same sketch alone and in a cohort.
    """

    anchor: Tensor | None = (
        None  # of an observer in ``training/layers.py``: the factors' gradients are taken too
    )

    def __init__(self, *, name: str, ranks: list[int], out_features: int, seed: int) -> None:
        self.sizes = [sketch_size(rank, out_features) for rank in ranks]
        draw = generator(seed, "sketch", name)
        self.frequencies = torch.randperm(out_features, generator=draw)[: max(self.sizes)]
        uniform = torch.rand(out_features, generator=draw, dtype=torch.float64)
        self.signs = torch.where(uniform < 0.5, -1, 1).to(torch.int8)
        self.total: Tensor | None = None

    @property
    def Psi(self) -> Tensor:  # noqa: N802  (the literature's letter, as in the formulas above)
        """``[k, out]`` in float64, rows orthonormal, for tests; ``add`` never forms it."""
        return torch.cat([block for _, block in self._blocks(self.signs.device)], dim=1)

    def _blocks(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of columns of ``Psi``: ``+-sqrt(2 / out) cos(pi f (2j + 1) / (2 out))``.

        Frequency 0 is the constant row, shorter by ``sqrt(2)``.
        """
        out_features = self.signs.shape[0]
        frequencies = self.frequencies.to(device, torch.float64)[:, None]
        lengths = ((2.0 - (frequencies == 0).double()) / out_features).sqrt()
        for start in range(0, out_features, _WIDTH):
            columns = slice(start, min(start + _WIDTH, out_features))
            places = torch.arange(columns.start, columns.stop, dtype=torch.float64, device=device)
            angles = frequencies * ((2.0 * places + 1.0) * (math.pi / (2 * out_features)))
            signs = self.signs[columns].to(device)
            yield columns, angles.cos_().mul_(signs).mul_(lengths)

    def add(self, x: Tensor, gradient: Tensor, num_slots: int) -> None:
        """Add inputs ``x [K * n, in]`` and output gradients ``[K * n, out]``, slot-major."""
        inputs = x.detach().reshape(num_slots, -1, x.shape[-1])
        outputs = gradient.detach().reshape(num_slots, -1, gradient.shape[-1])
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        projected = outputs.new_zeros(*outputs.shape[:2], len(self.frequencies), dtype=dtype)
        for columns, block in self._blocks(outputs.device):
            projected += outputs[..., columns].to(dtype) @ block.to(dtype).T
        part = projected.transpose(1, 2) @ inputs.to(dtype)
        self.total = part if self.total is None else self.total.add_(part)


def top_rows(sketch: Tensor, rank: int, fallback: Tensor) -> Tensor:
    """The top ``rank`` right singular vectors of ``sketch [..., k, in]``, ``[..., rank, in]``.

    They are scaled to the mean length of random rows, so that a learning rate suits both.
    Directions that the gradient does not have are taken from ``fallback``. A batch gives the bits
    of its matrices one by one on a CPU, whose LAPACK takes them so.
    """
    _, S, Vh = torch.linalg.svd(sketch.double(), full_matrices=False)
    taken = min(rank, S.shape[-1])
    S, Vh = S[..., :taken], Vh[..., :taken, :]
    live = ((S > 0) & (1e-6 * S[..., :1] < S))[..., None]
    # Signs that rounding does not turn; entries uniform in +-1/sqrt(in) give a row the squared
    # length 1/3 on average.
    largest = Vh.gather(-1, Vh.abs().argmax(-1, keepdim=True))
    signed = Vh * torch.where(largest < 0, -1.0, 1.0).to(Vh.dtype)
    rows = fallback.clone()
    rows[..., :taken, :] = torch.where(
        live, (signed / 3.0**0.5).to(rows.dtype), rows[..., :taken, :]
    )
    return rows
