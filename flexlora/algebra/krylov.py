"""Top singular directions of a dense matrix: a block Krylov range finder whose result is checked.

The left space is grown from a random block by ``X <- M M^T X``, orthogonalised against all before
(block Lanczos with full orthogonalisation; Musco and Musco, arXiv 1504.05477; small blocks: Meyer,
Musco and Musco, arXiv 2305.02535), and the best r directions inside it are taken (Rayleigh-Ritz):

    Q [D, m] orthonormal rows,  T = Q M M^T Q^T = E diag(s^2) E^T,  U = Q^T E[:, :r],  M~ = U U^T M

The contract is ``|M - M~| <= (1 + tolerance) |M - M_r|``. By Pythagoras ``|M - M~|^2`` is
``|M|^2 - |U^T M|^2``, both summed in float64, so the excess is decided by the energy that a
larger space would still find. That is extrapolated from what the last enlargements found: the
gains fall at least geometrically. A space can also stop
growing because its random start misses part of a cluster of equal values; so before it is accepted,
new random vectors outside the space are multiplied by ``M M^T``, and join it if they grow beyond
the r-th value.

Rounding of the products rotates the directions and loses energy by the squares of the angles. Where
the tail is large this is negligible even in bfloat16. Where it is small a float32 space is
corrected by subspace iteration in float64; where it is tiny, or that does not converge, the whole
search is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.algebra.gram import (
    columns_in_float64,
    gram_matrix,
    in_two_dtypes,
    orthonormal_columns,
    orthonormal_rows,
    product,
    transposed_product,
)

__all__ = ["ALLOWED_LOSS", "TopSpace", "top_space"]

BLOCK, PROBES, GUARD = 32, 16, 8
JUMP, LONGEST, NEAR = 0.4, 0.22, 30.0
SLOWEST_RATE = 0.1 / 64  # per column
SAFETY = 2.0  # an extrapolation can fall short where a flat spectrum's gains stop falling faster
BASIS_BLUR, BLUR, LARGEST_ANGLE = 8.0, 0.25, 1.0
REFINABLE = 1e-11  # of the energy: float32 resolves no smaller gain
REFINEMENTS = 3
DEPENDENT = 0.05
ALLOWED_LOSS = 5e-7  # of |M|: what a result in float32 loses anyway


@dataclass(frozen=True, kw_only=True, eq=False)
class TopSpace:
    """``left [m, k] right [k, n]``, M projected to a space of k >= r directions, in float64.

    One of the two is orthonormal. ``kept`` is the energy of the top r of the product, ``missing``
    what the best r directions have beyond it.
    """

    left: Tensor
    right: Tensor
    kept: float
    missing: float
    columns: int


class _Blurred(Exception):
    """The contract needs products in a finer dtype."""


def top_space(
    M: Tensor, rank: int, *, energy: float, tolerance: float, max_columns: int
) -> TopSpace | None:
    """The top left singular space of ``M [m, n]``; ``None`` if ``max_columns`` were not enough.

    Costs about ``4 m n D`` and ``4 m D^2`` for the D columns that it takes, 1.5 r to 2 r where the
    values decay and 3 r to 5 r where they are flat. Deterministic: the random draws have a fixed
    seed.
    """
    limits = _Limits(energy=energy, tolerance=tolerance)
    for products in _product_dtypes(M):
        try:
            return _search(_Space(M, rank, max_columns, products), limits)
        except _Blurred:
            continue
    return None


def _product_dtypes(M: Tensor) -> Iterator[torch.dtype]:
    """Dtypes of products to try on this device, the coarsest first."""
    if M.dtype == torch.float32:
        if M.is_cuda or torch.cpu._is_avx512_bf16_supported():
            yield torch.bfloat16
        yield torch.float32
    yield torch.float64


@dataclass(frozen=True, kw_only=True)
class _Limits:
    """The energy that may be missing, and the energy that rounding may lose."""

    energy: float
    tolerance: float

    def missing(self, kept: float) -> float:
        """``(1 + tolerance)^2 - 1`` of the tail, with a margin for rounding."""
        tail = max(self.energy - kept, 0.0)
        return 1.8 * self.tolerance * tail + ALLOWED_LOSS**2 * self.energy

    def small_tail(self, kept: float) -> bool:
        """Whether float32 rounding of the energies may exceed the energy that may be missing."""
        return self.missing(kept) < 32.0 * torch.finfo(torch.float32).eps * self.energy

    def angles(self, values: Tensor, products: torch.dtype) -> Tensor:
        """The angle by which rounding rotates each wanted direction.

        The basis itself rounds at a few eps; products with ``M M^T`` round at ``eps s_1^2``, which
        rotates direction i by a share of ``eps (s_1 / s_i)^2``.
        """
        basis = torch.finfo(_basis_dtype(products)).eps
        ratios = values[-1] / values.clamp_min(torch.finfo(torch.float64).tiny)
        return (basis * BASIS_BLUR + torch.finfo(products).eps * BLUR * ratios).clamp_max(1.0)

    def blur(self, values: Tensor, products: torch.dtype) -> tuple[float, bool]:
        """The energy that rounding may lose, and whether that is too much of the allowance."""
        if products == torch.float64:
            return 0.0, False
        lost = 2.0 * float((self.angles(values, products).square() * values).sum())
        # The tail may be smaller than it looks by the rounding of the energies.
        kept = float(values.sum()) + 4.0 * torch.finfo(products).eps * self.energy
        return lost, lost > 0.5 * self.missing(kept)

    def refinable(self, values: Tensor, products: torch.dtype) -> bool:
        """Whether subspace iteration in float64 can correct the rounding."""
        resolved = self.missing(float(values.sum())) > REFINABLE * self.energy
        angle = float(self.angles(values, products).max())
        return products == torch.float32 and resolved and angle < LARGEST_ANGLE


def _basis_dtype(products: torch.dtype) -> torch.dtype:
    return torch.float64 if products == torch.float64 else torch.float32


def _search(space: _Space, limits: _Limits) -> TopSpace | None:
    """Grow the space until the energy that it misses is within the tolerance.

    Raises:
        _Blurred: the products' rounding hides what is asked for.
    """
    checks: list[tuple[int, float]] = []
    next_check, likely = space.rank + 1, False
    missing = allowed = math.inf
    while space.grow():
        if space.coarse and space.size == space.block:
            _coarsen(space, limits)
        if space.size <= space.rank or (space.size < next_check and not space.full):
            continue
        found = _ritz_values(space, limits, with_vectors=likely)
        values, kept = found[-space.rank :], float(found[-space.rank :].sum())
        lost, blurred = limits.blur(values, space.products)
        if blurred and not limits.refinable(values, space.products):
            raise _Blurred
        allowed = 0.5 * limits.missing(kept) if blurred else limits.missing(kept) - lost
        checks.append((space.size, kept))
        missing, rate = _extrapolated(checks)
        missing = min(missing, max(limits.energy - kept, 0.0))
        missing *= _shrinking(found, space.rank) if blurred else 1.0
        if missing <= allowed and not space.misses(float(values[0]), allowed):
            if blurred:
                return _refined(space, found, missing, allowed)
            return _projected(space, found, missing + lost, limits)
        step = _schedule(missing, allowed, rate, size=space.size, block=space.block)
        next_check, likely = space.size + step, step == space.block and missing <= NEAR * allowed
    if space.products == torch.bfloat16 and missing <= NEAR * allowed:
        raise _Blurred
    return None


def _coarsen(space: _Space, limits: _Limits) -> None:
    """Use products in bfloat16 from now on, unless the first values rule them out."""
    if not limits.blur(space.ritz(with_vectors=False), torch.bfloat16)[1]:
        space.products, space.factor = torch.bfloat16, space.M.bfloat16()


def _ritz_values(space: _Space, limits: _Limits, *, with_vectors: bool) -> Tensor:
    found = space.ritz(with_vectors=with_vectors)
    if not space.precise and limits.small_tail(float(found[-space.rank :].sum())):
        space.precise = True
        found = space.ritz(with_vectors=with_vectors)
    return found


def _projected(space: _Space, found: Tensor, missing: float, limits: _Limits) -> TopSpace:
    """``U U^T M`` for the wanted directions.

    Raises:
        _Blurred: the products' rounding has mixed unwanted directions in.
    """
    U, _ = orthonormal_columns(space.directions(space.rank).double())
    dtype = torch.float64 if space.precise else space.M.dtype
    right = transposed_product(space.M, U.to(dtype)).double()
    kept = float(right.square().sum())
    if space.products == torch.bfloat16:
        missing += _mixed_in(found, gram_matrix(right), space.rank)
        if missing > limits.missing(kept):
            raise _Blurred
    return TopSpace(left=U, right=right.T, kept=kept, missing=missing, columns=space.size)


def _mixed_in(found: Tensor, gram: Tensor, rank: int) -> float:
    """The energy lost by rounding of T, to second order: ``sum_ij N_ij^2 / (s_i^2 - s_j^2)``.

    i are wanted directions, j others. The size of N is what the exact Gram matrix of the wanted
    directions, largest first, says of the rounded one.
    """
    wanted, others = found[-rank:], found[:-rank]
    noise = float((gram - torch.diag(wanted.flip(0).to(gram))).square().mean().sqrt())
    gaps = wanted[:, None] - others
    return SAFETY * float((noise**2 / (gaps + 2.0 * noise)).sum())


def _schedule(missing: float, allowed: float, rate: float, *, size: int, block: int) -> int:
    """How many columns to add before the next check: part of the extrapolated number."""
    if rate == 0.0:
        return block
    columns = min(JUMP * math.log(max(missing / allowed, 1.0)) / rate, LONGEST * size)
    return max(1, int(columns / block)) * block


def _extrapolated(kept: list[tuple[int, float]]) -> tuple[float, float]:
    """The energy still to come, from ``(columns, energy)`` of three checks; infinite before.

    The gain per column is taken to fall as ``exp(-rate * columns)`` from what it was over the last
    two stretches, and no faster than that; twice its integral from the end on is the estimate.
    Also the rate, 0.0 where it is not known.
    """
    if len(kept) < 3:
        return math.inf, 0.0
    (size_0, kept_0), (size_1, kept_1), (size_2, kept_2) = kept[-3:]
    before = max(kept_1 - kept_0, 0.0) / (size_1 - size_0)
    last = abs(kept_2 - kept_1) / (size_2 - size_1)
    if last == 0.0:
        return 0.0, 0.0
    rate = math.log(before / last) * 2.0 / (size_2 - size_0) if before > 0.0 else 0.0
    rate = max(rate, SLOWEST_RATE)
    return SAFETY * last * math.exp(-rate * (size_2 - size_1) / 2.0) / rate, rate


def _refined(space: _Space, found: Tensor, missing: float, allowed: float) -> TopSpace:
    """Subspace iteration in float64 from the wanted directions and a few more, until it settles.

    ``M^T U`` and ``M V`` each shrink what is wrong in direction i by ``s_j / s_i``, its energy by
    the square. What a step gained, with that ratio at the first direction left out, bounds what
    further ones would gain.

    Raises:
        _Blurred: it did not settle.
    """
    M, rank = space.M, space.rank
    U = space.directions(rank + GUARD).double()
    double = columns_in_float64(found[-U.shape[1] :], allowed / 4.0, length=M.shape[1])
    for _ in range(REFINEMENTS):
        MU = in_two_dtypes(transposed_product, M, orthonormal_columns(U)[0], double)
        V, gram = orthonormal_columns(MU)
        U = in_two_dtypes(product, M, V, double)
        before, after = torch.linalg.eigvalsh(gram), torch.linalg.eigvalsh(gram_matrix(U))
        kept, gained = float(after[-rank:].sum()), float(after[-rank:].sum() - before[-rank:].sum())
        ratio = _shrinking(after, rank)
        missing *= ratio
        left = SAFETY * abs(gained) * ratio / (1.0 - ratio)
        if missing + left <= allowed:
            missing += left
            return TopSpace(left=U, right=V.T, kept=kept, missing=missing, columns=space.size)
    raise _Blurred


def _shrinking(values: Tensor, rank: int) -> float:
    """``s_k^2 / s_r^2``, from ascending squared values of which the last are the wanted ones."""
    first = max(values.shape[0] - rank - GUARD, 0)
    return min(max(float(values[first] / values[-rank]), 0.0), 0.999)


class _Space:
    """Orthonormal rows ``Q [D, m]`` and ``T = Q M M^T Q^T``, grown block by block.

    T has the coefficients that orthogonalisation subtracts from ``M M^T X``. In exact arithmetic
    only those of the last two blocks are nonzero; these are subtracted first, and one pass over the
    whole basis removes rounding errors (Simon 1984). Only the lower triangle of T is stored. A
    coarse space begins in float32, until its first block shows whether bfloat16 is enough.
    """

    def __init__(self, M: Tensor, rank: int, max_columns: int, products: torch.dtype) -> None:
        m, n = M.shape
        self.coarse = products == torch.bfloat16
        self.M, self.rank, self.size = M, rank, 0
        self.products = torch.float32 if self.coarse else products
        self.factor = M.to(self.products)
        self.precise, self._begins, self._dtype = False, 0, _basis_dtype(products)
        self._generator = torch.Generator().manual_seed(0)
        capacity = min(max_columns, m)
        self._Q = M.new_empty(capacity, m, dtype=self._dtype)
        self._T = M.new_zeros(capacity, capacity, dtype=torch.float64)
        self._vectors = self._T[:0]
        self.block = min(BLOCK, max(PROBES, rank))
        self._next = self._times(self._random(self.block, n))
        self._scale = self._next.norm(dim=1).amax()

    @property
    def full(self) -> bool:
        """Whether there is no room for the next block."""
        return self.size + self._next.shape[0] > self._Q.shape[0]

    def grow(self) -> bool:
        """One block more; ``False`` when there is no room for it."""
        if self.full:
            return False
        X = self._orthogonal(self._next)
        before, begin, end = self._begins, self.size, self.size + X.shape[0]
        self._Q[begin:end] = X
        self._begins, self.size = begin, end
        Y = self._times(self._transposed_times(X))
        self._scale = Y.norm(dim=1).amax()
        for first in (before, 0):
            Q = self._Q[first:end]
            inside = Y @ Q.T
            self._T[begin:end, first:end] += inside
            Y = Y - inside @ Q
        self._next = Y
        return True

    def _times(self, Y: Tensor) -> Tensor:
        return (Y.to(self.products) @ self.factor.T).to(self._dtype)

    def _transposed_times(self, X: Tensor) -> Tensor:
        return (X.to(self.products) @ self.factor).to(self._dtype)

    def _random(self, rows: int, columns: int) -> Tensor:
        draw = torch.randn(rows, columns, generator=self._generator, dtype=torch.float32)
        return draw.to(device=self.M.device, dtype=self._dtype)

    def _outside(self, X: Tensor) -> Tensor:
        Q = self._Q[: self.size]
        return X - (X @ Q.T) @ Q

    def _orthogonal(self, X: Tensor) -> Tensor:
        """Orthonormal rows that span X, which lies outside the space up to rounding.

        Normalising a short row magnifies its rounding, so a basis with short rows is orthogonalised
        once more (twice is enough: Giraud et al. 2005). Zero rows are replaced by random ones.
        """
        X, left = orthonormal_rows(X)
        spent = left <= 30.0 * torch.finfo(self._dtype).eps * self._scale
        if bool(spent.any()):
            X[spent] = self._random(int(spent.sum()), X.shape[1]) / X.shape[1] ** 0.5
            X = orthonormal_rows(self._outside(X))[0]
        if bool((left <= DEPENDENT * self._scale).any()):
            X = orthonormal_rows(self._outside(X))[0]
        return X

    def ritz(self, *, with_vectors: bool) -> Tensor:
        """The eigenvalues of ``T``, ascending, in float64; ``with_vectors`` stores the vectors.

        Gains are precise although ``T`` was rounded: its old part is the same every time.
        """
        T = self._T[: self.size, : self.size]
        T = T if self.precise else T.to(self._dtype)
        if not with_vectors:
            return torch.linalg.eigvalsh(T).double()
        values, self._vectors = torch.linalg.eigh(T)
        return values.double()

    def directions(self, count: int) -> Tensor:
        """``Q^T E``, ``[m, count]``, the largest value first."""
        if self._vectors.shape[0] != self.size:
            self.ritz(with_vectors=True)
        return self._Q[: self.size].T @ self._vectors[:, -count:].flip(1).to(self._dtype)

    def misses(self, smallest: float, allowed: float) -> bool:
        """Whether fresh vectors outside the space grow beyond its r-th value; if so, they join.

        They do if r of them could add more than ``allowed``.
        """
        if self.size + PROBES > self._Q.shape[0]:
            return False
        X = self._random(PROBES, self.M.shape[0])
        for _ in range(2):
            X = orthonormal_rows(self._outside(X))[0]
            X = self._times(self._transposed_times(X))
        for _ in range(2):
            X = orthonormal_rows(self._outside(X))[0]
        largest = torch.linalg.matrix_norm(self._transposed_times(X), 2)
        gain = float(largest) ** 2 - smallest
        missing = gain > max(torch.finfo(self.products).eps * smallest, allowed / self.rank)
        if missing:
            self._next = torch.cat([X * self._scale, self._next])
        return missing
