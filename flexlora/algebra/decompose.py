"""The best rank-r approximation of a sum of low-rank products, by the cheapest adequate route.

    M = dense + sum_i w_i L_i R_i,   [m, n],  R = sum of the ranks,   T_r(M) = U S Vh

Exact routes: ``factored`` never forms M (QR of both stacks in float64), ``factored-gram`` does the
same from Gram matrices (``algebra/gram.py``), ``dense-svd`` forms M, ``dense-eigh`` takes the
eigenvectors of its smaller Gram matrix. ``krylov`` (``algebra/krylov.py``) finds a space that is
as good as the best one up to ``tolerance`` and checks that it is; where the check fails an exact
route follows. A stack needs no Krylov route of its own: the energy has to be exact, its Gram
matrices cost as much as the core they lead to, and the core is small.

Everything is exact when ``dtype`` is float64 (QR and SVD in float64, 1e-12). For float32 all
energies, certificates, cores and final factors are float64; the large products are float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.algebra.gram import squared_norm, svd_by_gram
from flexlora.algebra.linalg import (
    FactoredSVD,
    finished_svd,
    product_norm,
    stack_products,
    svds_of_products,
)
from flexlora.algebra.routes import Solved, choose_route, top_of_dense

__all__ = ["Decomposition", "LazySums", "MatrixSum", "Term", "decompose", "dense_pays", "fold"]

Term = tuple[float, Tensor, Tensor]

DOUBLE_ACCUMULATOR = 1 << 20
COLUMNS_AT_ONCE = 1024
BATCH_ENTRIES = {"cpu": 1 << 16, "cuda": 1 << 26}


@dataclass(frozen=True, kw_only=True, eq=False)
class MatrixSum:
    """``dense + sum of weight * left @ right``, ``[m, n]``; ``left [m, k]``, ``right [k, n]``.

    Raises:
        ValueError: a part that does not have the sum's shape.
    """

    shape: tuple[int, int]
    terms: tuple[Term, ...] = ()
    dense: Tensor | None = None

    def __post_init__(self) -> None:
        m, n = self.shape
        if self.dense is not None and tuple(self.dense.shape) != (m, n):
            raise ValueError(f"dense is {tuple(self.dense.shape)}, expected {(m, n)}.")
        for index, (_, left, right) in enumerate(self.terms):
            if (left.shape[0], right.shape[1]) != (m, n) or left.shape[1] != right.shape[0]:
                raise ValueError(
                    f"term {index} is {tuple(left.shape)} @ {tuple(right.shape)}, "
                    f"expected [{m}, k] @ [k, {n}]."
                )

    @property
    def rank_bound(self) -> int:
        """R, the sum of the terms' ranks."""
        return sum(left.shape[1] for _, left, _ in self.terms)

    @property
    def device(self) -> torch.device:
        if self.dense is not None:
            return self.dense.device
        return self.terms[0][1].device if self.terms else torch.device("cpu")

    def __add__(self, other: MatrixSum) -> MatrixSum:
        """All terms of both, none of them multiplied out."""
        parts = [dense for dense in (self.dense, other.dense) if dense is not None]
        dense = parts[0] + parts[1] if len(parts) == 2 else next(iter(parts), None)
        return MatrixSum(shape=self.shape, terms=self.terms + other.terms, dense=dense)

    def __sub__(self, other: MatrixSum) -> MatrixSum:
        return self + other.scaled(-1.0)

    def scaled(self, weight: float) -> MatrixSum:
        """``weight`` times the sum."""
        terms = tuple((weight * w, left, right) for w, left, right in self.terms)
        dense = self.dense
        if dense is not None and weight != 1.0:
            dense = dense * weight
        return MatrixSum(shape=self.shape, terms=terms, dense=dense)

    def apply(self, probes: Tensor) -> Tensor:
        """``M @ probes``, ``[n, k] -> [m, k]``, in float64."""
        total = probes.new_zeros(self.shape[0], probes.shape[1], dtype=torch.float64)
        if self.dense is not None:
            total += (self.dense @ probes.to(self.dense.dtype)).double()
        for weight, left, right in self.terms:
            total += weight * (left.double() @ (right.double() @ probes))
        return total

    def energy(self) -> float:
        """``|M|_F^2`` in float64: from Gram matrices without a dense part, O((m + n) R^2)."""
        if self.dense is not None:
            return squared_norm(self.to_dense() if self.terms else self.dense)
        return product_norm(*stack_products(self.terms)) ** 2 if self.terms else 0.0

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The sum formed in ``dtype`` (None: as ``fold`` would); never the caller's own tensor."""
        m, n = self.shape
        if self.dense is not None:
            start = self.dense.to(dtype or self.dense.dtype, copy=True)
        else:
            start = torch.zeros(m, n, dtype=dtype or _accumulator(m, n), device=self.device)
        return fold(start, self.terms, self.shape)


class LazySums(Mapping[str, MatrixSum]):
    """Sums by module name, computed at each access: none of them stays in memory."""

    def __init__(self, names: Iterable[str], make: Callable[[str], MatrixSum]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> MatrixSum:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __add__(self, other: Mapping[str, MatrixSum]) -> LazySums:
        return LazySums(self, lambda name: self[name] + other[name])

    def __sub__(self, other: Mapping[str, MatrixSum]) -> LazySums:
        return LazySums(self, lambda name: self[name] - other[name])


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposition:
    """``T_r(M)`` with its energy, route, time and error.

    ``energy`` is ``|M|_F^2``. ``route`` produced the result; ``seconds`` is its share of the batch.
    ``error`` estimates ``|M - M~| / |M - M_r| - 1``: by how much the approximation misses more than
    the best one of its rank must. It is 0.0 for the exact routes (true up to rounding); for
    ``krylov`` it is at most the tolerance.
    """

    svd: FactoredSVD
    energy: float
    route: str
    seconds: float
    error: float


def decompose(
    matrices: Mapping[str, MatrixSum],
    *,
    max_rank: int,
    dtype: torch.dtype,
    tolerance: float = 1e-4,
) -> dict[str, Decomposition]:
    """The top ``max_rank`` directions of every matrix, in ``dtype``, signs fixed, rounding dropped.

    ``|M - M~| <= (1 + tolerance) |M - M_r| + 5e-7 |M|``, the last for float32 alone. Small
    matrices of one shape are done as one batch: the same call gives the same bits.

    Raises:
        ValueError: a rank below 1, a tolerance that is not positive, or a ``dtype`` of half
            precision, whose rounding would be cut off as if it were the matrix's rank.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}, expected torch.float32 or torch.float64.")
    if max_rank < 1 or not tolerance > 0:
        raise ValueError(
            f"max_rank is {max_rank} and tolerance {tolerance}, expected at least 1 and above 0."
        )
    results: dict[str, Decomposition] = {}
    for route, names in _batches(matrices, rank=max_rank, dtype=dtype):
        began = time.perf_counter()
        batch = [matrices[name] for name in names]
        solve = SOLVERS[route]
        solved = solve(batch, route, rank=max_rank, dtype=dtype, tolerance=tolerance)
        seconds = (time.perf_counter() - began) / len(names)
        for name, one in zip(names, solved, strict=True):
            results[name] = Decomposition(
                svd=one.svd, energy=one.energy, route=one.route, error=one.error, seconds=seconds
            )
    return {name: results[name] for name in matrices}


def _batches(
    matrices: Mapping[str, MatrixSum], *, rank: int, dtype: torch.dtype
) -> Iterator[tuple[str, list[str]]]:
    """Names to be solved as one batch: equal shapes, R and routes."""
    groups: dict[tuple, list[str]] = {}
    for name, matrix in matrices.items():
        m, n, R, device = *matrix.shape, matrix.rank_bound, matrix.device.type
        known = matrix.dense is not None
        route = choose_route((m, n), R, rank, dtype, has_dense=known, device=device)
        room = BATCH_ENTRIES.get(device, BATCH_ENTRIES["cuda"])
        size = (m + n) * R if route.startswith("factored") else m * n
        key = (route, m, n, R, matrix.device, max(1, room // max(size, 1)))
        groups.setdefault(key, []).append(name)
    for (route, *_, most), names in groups.items():
        for i in range(0, len(names), most):
            yield route, names[i : i + most]


def _solve_stacks(
    batch: Sequence[MatrixSum], route: str, *, rank: int, dtype: torch.dtype, tolerance: float
) -> list[Solved]:
    """Routes that never form the matrix; QR where a check of the Gram route fails."""
    results: list[Solved | None] = [None] * len(batch)
    if route == "factored-gram":
        parts = [_raw_stack(matrix) for matrix in batch]
        left, weights, right = (_stacked(part) for part in zip(*parts, strict=True))
        found = svd_by_gram(left, weights, right, max_rank=rank, dtype=dtype)
        results = [one and Solved(svd=one[0], energy=one[1], route=route) for one in found]
    left_over = [i for i, one in enumerate(results) if one is None]
    if left_over:
        stacks = [stack_products(batch[i].terms) for i in left_over]
        left, right = (_stacked(part) for part in zip(*stacks, strict=True))
        for i, exact in zip(left_over, svds_of_products(left, right), strict=True):
            energy = float(exact.S.square().sum())
            svd = finished_svd(exact.U, exact.S, exact.Vh, dtype=dtype, rank=rank)
            results[i] = Solved(svd=svd, energy=energy, route="factored")
    return [one for one in results if one is not None]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """``[b, ...]``; one matrix by itself is not copied."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _raw_stack(matrix: MatrixSum) -> tuple[Tensor, Tensor, Tensor]:
    """``left [m, R]``, ``weights [R]``, ``right [R, n]`` in the dtype that the terms came in."""
    left = torch.cat([left for _, left, _ in matrix.terms], dim=1)
    right = torch.cat([right for *_, right in matrix.terms], dim=0)
    weights = [weight for weight, block, _ in matrix.terms for _ in range(block.shape[1])]
    return left, torch.tensor(weights, dtype=torch.float64, device=left.device), right


def _solve_dense(
    batch: Sequence[MatrixSum], route: str, *, rank: int, dtype: torch.dtype, tolerance: float
) -> list[Solved]:
    wanted = torch.float64 if dtype == torch.float64 else None
    return [
        top_of_dense(
            # Without terms the dense part is used without a copy.
            matrix.to_dense(wanted) if matrix.dense is None or matrix.terms else matrix.dense,
            min(rank, *matrix.shape),
            dtype=dtype,
            tolerance=tolerance,
            route=route,
        )
        for matrix in batch
    ]


def _solve_zero(
    batch: Sequence[MatrixSum], route: str, *, rank: int, dtype: torch.dtype, tolerance: float
) -> list[Solved]:
    return [
        Solved(svd=FactoredSVD.zero(*matrix.shape, dtype, matrix.device), energy=0.0, route=route)
        for matrix in batch
    ]


SOLVERS = {
    "zero": _solve_zero,
    "factored": _solve_stacks,
    "factored-gram": _solve_stacks,
    "dense-svd": _solve_dense,
    "dense-eigh": _solve_dense,
    "krylov": _solve_dense,
}


def fold(dense: Tensor | None, terms: Iterable[Term], shape: tuple[int, int]) -> Tensor:
    """``dense += sum of the terms`` in place, as a few products of ``COLUMNS_AT_ONCE`` columns.

    A new accumulator is float64 up to 2^20 entries and float32 above, where a sum over clients
    rounds at 1e-7 and float64 would double the largest tensor of the server.
    """
    for block in _blocks(terms):
        if dense is None:
            dense = torch.zeros(shape, dtype=_accumulator(*shape), device=block[0][1].device)
        left = torch.cat([left.to(dense.dtype) * weight for weight, left, _ in block], dim=1)
        right = torch.cat([right.to(dense.dtype) for *_, right in block], dim=0)
        dense.addmm_(left, right)
    return torch.zeros(shape, dtype=_accumulator(*shape)) if dense is None else dense


def _accumulator(m: int, n: int) -> torch.dtype:
    return torch.float64 if m * n <= DOUBLE_ACCUMULATOR else torch.float32


def _blocks(terms: Iterable[Term]) -> Iterator[list[Term]]:
    """The terms in their order, in groups wide enough for products to run at full speed."""
    block: list[Term] = []
    columns = 0
    for term in terms:
        block.append(term)
        columns += term[1].shape[1]
        if columns >= COLUMNS_AT_ONCE:
            yield block
            block, columns = [], 0
    if block:
        yield block


def dense_pays(shape: tuple[int, int], rank_bound: int) -> bool:
    """Whether a dense accumulator is smaller than the stacked factors: ``m n < R (m + n)``."""
    m, n = shape
    return m * n < rank_bound * (m + n)
