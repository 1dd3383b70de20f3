"""SVD of ``left @ right`` from float64 Gram matrices: matrix products instead of Householder QR.

With ``left^T left = T_l^T T_l`` and ``right right^T = T_r^T T_r`` (Cholesky) the columns of ``left
T_l^-1`` and ``right^T T_r^-1`` are orthonormal and the SVD of ``left diag(w) right`` is that of the
small core ``T_l diag(w) T_r^T`` (Cholesky QR; Fukaya et al. 2014). Only the columns of the result
are multiplied out. Squaring costs half the digits: a direction of a stack whose relative size is
below the root of float64's rounding is not resolved. So the orthogonality of every result is
checked by random probes, and the norm of what was left out against that of the sum; a matrix that
fails gets ``None`` and the caller uses QR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.algebra.linalg import FactoredSVD, finished_svd, live_count

__all__ = [
    "columns_in_float64",
    "gram_matrix",
    "in_two_dtypes",
    "orthonormal_columns",
    "orthonormal_rows",
    "product",
    "squared_norm",
    "svd_by_gram",
    "transposed_product",
]

ORTHOGONALITY = 1e-5
LEFT_OUT = 1e-6
WELL_CONDITIONED = 1e-3
SQUARED = 1e-5
ENTRIES_AT_ONCE = 1 << 19
SINGLE_PRECISION_NORM = 8.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Core:
    """The sum as ``(left inverse_left) matrix (inverse_right^T right)``, orthonormal outside.

    All are ``[b, R, R]``; ``unresolved [b]`` bounds the norm of the directions that were left out
    because the Gram matrices do not resolve them.
    """

    matrix: Tensor
    inverse_left: Tensor
    inverse_right: Tensor
    unresolved: Tensor


def gram_matrix(columns: Tensor) -> Tensor:
    """``columns^T columns`` in float64, ``[..., k, k]``; each off-diagonal half computed once."""
    k = columns.shape[-1]
    if k < 160:
        columns = columns.double()
        return columns.mT @ columns
    half = (k + 1) // 2
    first, second = columns[..., :half].double(), columns[..., half:].double()
    gram = columns.new_empty(*columns.shape[:-2], k, k, dtype=torch.float64)
    gram[..., :half, :half] = gram_matrix(first)
    gram[..., half:, half:] = gram_matrix(second)
    gram[..., :half, half:] = first.mT @ second
    gram[..., half:, :half] = gram[..., :half, half:].mT
    return gram


def svd_by_gram(
    left: Tensor, weights: Tensor, right: Tensor, *, max_rank: int, dtype: torch.dtype
) -> list[tuple[FactoredSVD, float] | None]:
    """Top of ``left[i] diag(weights[i]) right[i]`` and its energy, per matrix of a batch.

    ``left [b, m, R]``, ``weights [b, R]``, ``right [b, R, n]``; at most ``max_rank`` directions in
    ``dtype``; ``None`` where a check failed. Costs about half of QR, O((m + n) R^2 + R^3).
    """
    core = _core(left, weights, right)
    U_core, S, Vh_core = torch.linalg.svd(core.matrix)
    keep = min(max_rank, left.shape[-2], right.shape[-1], S.shape[-1])
    to_U = core.inverse_left @ U_core[..., :keep]
    to_V = core.inverse_right @ Vh_core[..., :keep, :].mT
    energy = S.square().sum(dim=-1)
    live = [live_count(row, dtype) for row in S]
    wide = min(max(live), keep)
    U = _multiply(left, to_U[..., :wide], dtype)
    V = _multiply(right.mT, to_V[..., :wide], dtype)
    results: list[tuple[FactoredSVD, float] | None] = []
    for i, count in enumerate(live):
        if not bool(core.unresolved[i] <= LEFT_OUT * energy[i].sqrt()):
            results.append(None)
            continue
        svd = finished_svd(U[i], S[i, :wide], V[i].mT, dtype=dtype, rank=count)
        checked = _orthonormal(svd.U) and _orthonormal(svd.Vh.mT)
        results.append((svd, float(energy[i])) if checked else None)
    return results


def _core(left: Tensor, weights: Tensor, right: Tensor) -> Core:
    """The sum inside orthonormal bases of both stacks.

    Columns are scaled to length 1 first: client weights and scalings differ by orders of magnitude,
    which would look like bad conditioning.
    """
    left_gram, left_norms = _normalised(gram_matrix(left))
    right_gram, right_norms = _normalised(gram_matrix(right.mT))
    sizes = weights.double() * left_norms * right_norms
    left_root, left_inverse, left_lost = _whiten(left_gram)
    right_root, right_inverse, right_lost = _whiten(right_gram)
    return Core(
        matrix=(left_root * sizes[..., None, :]) @ right_root.mT,
        inverse_left=left_inverse / _or_one(left_norms)[..., :, None],
        inverse_right=right_inverse / _or_one(right_norms)[..., :, None],
        unresolved=sizes.square().sum(dim=-1).sqrt() * torch.maximum(left_lost, right_lost),
    )


def _or_one(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms, 1.0)


def _normalised(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix of the columns at length 1 (a zero column stays zero), and their lengths."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    scale = _or_one(norms)
    return gram / (scale[..., :, None] * scale[..., None, :]), norms


def _whiten(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``root, inverse, lost``: ``gram = root^T root``, ``inverse^T gram inverse = 1``.

    Cholesky where the columns are well apart. Else eigenvectors, those below rounding left out
    (zero rows of ``root``, zero columns of ``inverse``); ``lost [b]`` is the root of the largest
    eigenvalue that may be hidden.
    """
    size, lost = gram.shape[-1], gram.new_zeros(gram.shape[:-2])
    factor, failed = torch.linalg.cholesky_ex(gram)
    smallest = factor.diagonal(dim1=-2, dim2=-1).amin(dim=-1)
    if bool(((failed == 0) & (smallest > WELL_CONDITIONED)).all()):
        eye = torch.eye(size, dtype=gram.dtype, device=gram.device).expand_as(gram)
        return factor.mT, torch.linalg.solve_triangular(factor.mT, eye, upper=True), lost
    values, vectors = torch.linalg.eigh(gram)
    rounding = torch.finfo(gram.dtype).eps * values[..., -1:]
    alive = values > size * rounding
    hidden = torch.where(alive, 0.0, values.abs()).amax(dim=-1)
    lost = torch.where(alive.all(dim=-1), 0.0, 2.0 * hidden + 4.0 * rounding[..., 0]).sqrt()
    roots = torch.where(alive, values, 1.0).sqrt()
    root = torch.where(alive, roots, 0.0)[..., :, None] * vectors.mT
    inverse = vectors * torch.where(alive, 1.0 / roots, 0.0)[..., None, :]
    return root, inverse, lost


def _multiply(columns: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """``columns @ coefficients``, in float32 only where it cannot cost orthogonality.

    The rounding of column j is that of ``columns`` times the size of its coefficients; where nearly
    parallel columns are subtracted these are large.
    """
    sizes = columns.square().sum(dim=-2).sqrt().double()
    magnified = (sizes[..., :, None] * coefficients).square().sum(dim=-2).sqrt()
    single = columns.dtype == dtype == torch.float32
    if single and bool((magnified <= SINGLE_PRECISION_NORM).all()):
        return (coefficients.float().mT @ columns.mT).mT
    return (coefficients.mT @ columns.double().mT).mT


def _orthonormal(columns: Tensor) -> bool:
    """Whether ``columns^T columns z = z`` for four random z: an error of size e shows as e |z|."""
    k = columns.shape[1]
    generator = torch.Generator().manual_seed(k)
    probes = torch.randn(k, 4, generator=generator, dtype=torch.float64).to(columns.device)
    columns = columns.double()
    residual = columns.mT @ (columns @ probes) - probes
    return bool((residual.abs() <= ORTHOGONALITY).all())


def orthonormal_columns(X: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of float64 columns, in their order, and their Gram matrix.

    By Cholesky where squaring leaves enough digits, which is twice as fast as QR.
    """
    gram = gram_matrix(X)
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    if int(failed) or float(diagonal.min()) <= SQUARED * float(diagonal.max()):
        return torch.linalg.qr(X)[0], gram
    return torch.linalg.solve_triangular(factor.mT, X, upper=True, left=False), gram


def _row_chunks(M: Tensor) -> range:
    return range(0, M.shape[0], max(1, ENTRIES_AT_ONCE // max(M.shape[1], 1)))


def transposed_product(M: Tensor, X: Tensor) -> Tensor:
    """``M^T @ X`` in the dtype of X, without a copy of M in it."""
    if M.dtype == X.dtype:
        return (X.T @ M).T
    result, rows = X.new_zeros(X.shape[1], M.shape[1]), _row_chunks(M)
    for i in rows:
        result.addmm_(X[i : i + rows.step].T, M[i : i + rows.step].to(X.dtype))
    return result.T


def product(M: Tensor, X: Tensor) -> Tensor:
    """``M @ X`` in the dtype of X, without a copy of M in it."""
    rows, turned = _row_chunks(M), X.T.contiguous()
    parts = [turned @ M[i : i + rows.step].to(X.dtype).T for i in rows]
    return torch.cat(parts, dim=1).T


def squared_norm(M: Tensor) -> float:
    """``|M|_F^2`` in float64, without a copy of M in it."""
    rows = _row_chunks(M)
    parts = (M[i : i + rows.step].double().flatten() for i in rows)
    return sum(float(torch.dot(part, part)) for part in parts)


def orthonormal_rows(X: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows that span those of X, and each row's norm outside the earlier ones."""
    Q, R = torch.linalg.qr(X.T)
    return Q.T.contiguous(), R.diagonal().abs()


def columns_in_float64(values: Tensor, allowed: float, *, length: int) -> int:
    """How many of the largest directions need products in float64 for energies within ``allowed``.

    ``values`` are squared singular values, ascending. Float32 rounds ``M^T u_i`` at ``eps s_1``: at
    random against its own size ``s_i``, so ``eps s_1 s_i / sqrt(length)`` in energy, and squared.
    """
    eps = 8.0 * torch.finfo(torch.float32).eps
    values = values.clamp_min(0.0)
    counts = torch.arange(1, len(values) + 1, device=values.device)
    first = eps * (values[-1] * values.cumsum(0) / length).sqrt()
    second = eps**2 * values[-1] * counts
    return len(values) - int((first + second <= allowed).sum())


def in_two_dtypes(
    multiply: Callable[[Tensor, Tensor], Tensor], M: Tensor, X: Tensor, double: int
) -> Tensor:
    """``multiply(M, X)``, the first ``double`` columns in float64 and the others in float32."""
    parts = multiply(M, X[:, :double]), multiply(M, X[:, double:].float()).double()
    return torch.cat(parts, dim=1)
