"""Matrices of low rank as products: singular values, truncation, energies.

A matrix ``M [m, n]`` of rank at most k is given as ``left @ right`` with
``left [m, k]`` and ``right [k, n]``; the ``[m, n]`` product is never formed.

Dtype rule: factorisations, Gram matrices and energies are computed in float64 for any input, and
returned in the dtype of the input. In float32 the difference of two nearly equal energies has
read 0.0 where the truth was 2e-4; the cost is a factor of two in time and the matrices are thin.
Sums of matrices in half precision are kept in float32 (``sum_dtype``): in bfloat16 every direction
below 1/128 of the largest would be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "FactoredSVD",
    "column_signs",
    "energy_kept",
    "finished_svd",
    "inner_product",
    "live_count",
    "live_rows",
    "orthonormal_rows",
    "product_norm",
    "stack_products",
    "sum_dtype",
    "svd_of_product",
    "svds_of_products",
]

ROWS_AT_ONCE = 16  # of orthonormal rows


def sum_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype in which a sum of these is kept: float64 where one of them is, else float32."""
    return torch.float64 if torch.float64 in set(dtypes) else torch.float32


@dataclass(frozen=True, kw_only=True, eq=False)
class FactoredSVD:
    """``U [m, g]``, ``S [g]`` nonincreasing, ``Vh [g, n]``; g = 0 is the zero matrix."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def rank(self) -> int:
        return self.S.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.U.shape[0], self.Vh.shape[1]

    def truncate(self, rank: int) -> FactoredSVD:
        """``T_rank``: the best approximation of that rank in every unitarily invariant norm.

        Eckart-Young-Mirsky. Above the available rank it is the matrix itself.
        """
        return FactoredSVD(U=self.U[:, :rank], S=self.S[:rank], Vh=self.Vh[:rank])

    def to(self, dtype: torch.dtype) -> FactoredSVD:
        """The same in another dtype."""
        return FactoredSVD(U=self.U.to(dtype), S=self.S.to(dtype), Vh=self.Vh.to(dtype))

    def to_dense(self) -> Tensor:
        """``U diag(S) Vh``, ``[m, n]``."""
        return (self.U * self.S) @ self.Vh

    @staticmethod
    def zero(
        m: int,
        n: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> FactoredSVD:
        """The zero matrix ``[m, n]`` as an SVD without directions."""
        S = torch.zeros(0, dtype=dtype, device=device)
        return FactoredSVD(U=S.new_zeros(m, 0), S=S, Vh=S.new_zeros(0, n))


def svd_of_product(left: Tensor, right: Tensor) -> FactoredSVD:
    """Thin SVD of ``left @ right`` (``[m, k] @ [k, n]``), never forming the ``[m, n]`` product.

    ``left = Q_l R_l``, ``right^T = Q_r R_r``, SVD of the core ``R_l R_r^T``; g <= min(m, k, n).
    Costs O((m + n) k^2 + k^3) instead of O(m n min(m, n)). Directions below float64's rounding of
    the largest are left out.
    Signs are fixed (the entry of largest magnitude in each column of U is positive); equal singular
    values still share a free rotation.

    Raises:
        ValueError: the inner dimensions differ.
    """
    if left.shape[1] != right.shape[0]:
        raise ValueError(
            f"left is {tuple(left.shape)} and right {tuple(right.shape)}, "
            "expected [m, k] and [k, n]."
        )
    if left.shape[1] == 0:
        return FactoredSVD.zero(left.shape[0], right.shape[1], left.dtype, left.device)
    U, S, Vh = _thin_svds(left.double(), right.double())
    return finished_svd(U, S, Vh, dtype=torch.float64).to(left.dtype)


def svds_of_products(left: Tensor, right: Tensor) -> list[FactoredSVD]:
    """``svd_of_product`` of ``left[i] @ right[i]``, ``[b, m, k]`` and ``[b, k, n]``, in float64."""
    batch = zip(*_thin_svds(left.double(), right.double()), strict=True)
    return [finished_svd(U, S, Vh, dtype=torch.float64) for U, S, Vh in batch]


def _thin_svds(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.mT)
    U_core, S, Vh_core = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    return Q_left @ U_core, S, Vh_core @ Q_right.mT


def finished_svd(
    U: Tensor, S: Tensor, Vh: Tensor, *, dtype: torch.dtype, rank: int | None = None
) -> FactoredSVD:
    """The live directions, at most ``rank``, with fixed signs, contiguous in ``dtype``."""
    live = live_count(S, dtype)
    keep = live if rank is None else min(live, rank)
    U, S, Vh = U[:, :keep], S[:keep], Vh[:keep]
    signs = column_signs(U)
    return FactoredSVD(
        U=(U * signs).to(dtype).contiguous(),
        S=S.to(dtype).contiguous(),
        Vh=(signs[:, None] * Vh).to(dtype).contiguous(),
    )


def live_count(S: Tensor, dtype: torch.dtype) -> int:
    """How many of the nonincreasing float64 values are above the rounding error of the largest.

    The rounding is that of the factorisation (float64) or of the result's ``dtype``, whichever is
    coarser.
    """
    if S.shape[0] == 0:
        return 0
    noise = max(S.shape[0] * torch.finfo(torch.float64).eps, torch.finfo(dtype).eps)
    return int((noise * S[0] < S).sum())


def column_signs(U: Tensor) -> Tensor:
    """``[g]`` of +1 or -1: the sign of the entry of largest magnitude in each column."""
    if U.shape[1] == 0:
        return U.new_ones(0)
    largest = U.abs().argmax(dim=0, keepdim=True)
    return torch.where(U.gather(0, largest)[0] < 0, -1.0, 1.0).to(U.dtype)


def stack_products(terms: Sequence[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """``sum_k w_k left_k right_k`` as one product of ``[m, R]`` and ``[R, n]``, R = sum of the k.

    The identity ``[w_1 L_1 ... w_K L_K] @ [R_1; ...; R_K] = sum_k w_k L_k R_k``. The weights go
    into the left block in float64, so that a share of 1 returns the block's own bits.
    """
    left = torch.cat([weight * left.double() for weight, left, _ in terms], dim=1)
    right = torch.cat([right.double() for _, _, right in terms], dim=0)
    return left, right


def inner_product(left_1: Tensor, right_1: Tensor, left_2: Tensor, right_2: Tensor) -> float:
    """``<left_1 right_1, left_2 right_2>_F`` from float64 Gram matrices, O((m + n) k^2)."""
    gram_left = left_1.double().T @ left_2.double()
    gram_right = right_1.double() @ right_2.double().T
    return float((gram_left * gram_right).sum())


def product_norm(left: Tensor, right: Tensor) -> float:
    """``|left @ right|_F`` from float64 Gram matrices."""
    return max(inner_product(left, right, left, right), 0.0) ** 0.5


def energy_kept(S: Tensor, rank: int) -> float:
    """Share of ``sum S^2`` in the first ``rank`` values, in [0, 1]; 1.0 for the zero matrix."""
    energy = S.double().square()
    total = float(energy.sum())
    return float(energy[:rank].sum()) / total if total > 0 else 1.0


def live_rows(count: int, in_features: int, generator: torch.Generator) -> Tensor:
    """``[count, in_features]`` uniform in +-1/sqrt(in_features): PEFT's start of ``lora_A``.

    Rows are drawn one after another, so a longer draw begins with the shorter one: starts of
    unequal rank are nested.
    """
    bound = in_features**-0.5
    uniform = torch.rand(count, in_features, generator=generator, dtype=torch.float64)
    return (2.0 * bound) * uniform - bound


def orthonormal_rows(count: int, in_features: int, generator: torch.Generator) -> Tensor:
    """``[count, in_features]``, float64: orthonormal rows that span a uniformly random subspace.

    Blocks of Gaussian rows, each made orthogonal to the blocks before it and then orthonormal by
    QR. A block is always computed whole, so a longer draw begins with the bits of the shorter one.
    ``count`` is at most ``in_features``; costs O(count^2 in_features).
    """
    rows = torch.zeros(0, in_features, dtype=torch.float64)
    while rows.shape[0] < count:
        size = min(ROWS_AT_ONCE, in_features - rows.shape[0])
        block = torch.randn(size, in_features, generator=generator, dtype=torch.float64)
        for _ in range(2):  # once leaves errors of the rounding times the condition (Kahan)
            block = torch.linalg.qr((block - block @ rows.T @ rows).T)[0].T
        rows = torch.cat([rows, block])
    return rows[:count].contiguous()
