"""Cost model of the decomposition routes, and the routes over a dense matrix.

Costs are in operations of a float32 matrix product; the relative prices of other operations were
measured on one core (float64 products 2, a symmetric eigenproblem about 10 k^3 and an SVD
about 20 k^3 operations of the float64 product). On a GPU factorisations run at a small share of the
products' rate; its prices are estimates.

    dense-svd     M = U S Vh by LAPACK in float64
    dense-eigh    M M^T = E diag(s^2) E^T in float64, U = E[:, :r], then S and Vh from U^T M:
                  squaring leaves 1e-8 of the largest value, enough for a result in float32
    krylov        see flexlora/algebra/krylov.py; dense-eigh or dense-svd where it does not converge
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.algebra.gram import gram_matrix, squared_norm, svd_by_gram, transposed_product
from flexlora.algebra.krylov import ALLOWED_LOSS, top_space
from flexlora.algebra.linalg import FactoredSVD, finished_svd, svd_of_product

__all__ = ["Prices", "Solved", "choose_route", "dense_costs", "stack_costs", "top_of_dense"]

GRAM_OVERHEAD = 1e7  # many small steps: below about 200 x 200 QR is as fast
LARGEST_SHARE_OF_RANK = 0.25
LARGEST_SHARE_OF_COLUMNS = 0.5


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Cost of other operations in operations of a float32 product."""

    double: float
    eigh: float
    svd: float
    thin: float  # a product with a block of a few dozen columns


PRICES = {
    "cpu": Prices(double=2.0, eigh=10.0, svd=20.0, thin=1.4),
    "cuda": Prices(double=2.0, eigh=300.0, svd=2000.0, thin=2.0),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Solved:
    """``svd`` in the wanted dtype, ``|M|_F^2``, the route that produced it and its excess."""

    svd: FactoredSVD
    energy: float
    route: str
    error: float = 0.0


def choose_route(
    shape: tuple[int, int],
    rank_bound: int,
    rank: int,
    dtype: torch.dtype,
    *,
    has_dense: bool = False,
    device: str = "cpu",
) -> str:
    """The cheapest route for ``rank`` directions of a sum of ``rank_bound``; exact in float64."""
    if rank_bound == 0 and not has_dense:
        return "zero"
    prices = PRICES["cpu" if device == "cpu" else "cuda"]
    single = dtype != torch.float64
    costs = dense_costs(shape, rank, prices, single=single)
    if not has_dense:
        forming = 2.0 * shape[0] * shape[1] * rank_bound * (1.0 if single else prices.double)
        costs = {route: cost + forming for route, cost in costs.items()}
        costs |= stack_costs(shape, rank_bound, rank, prices, single=single)
    return min(costs, key=lambda route: costs[route])


def stack_costs(
    shape: tuple[int, int], rank_bound: int, rank: int, prices: Prices, *, single: bool
) -> dict[str, float]:
    """Costs of the routes that never form the matrix."""
    (m, n), R = shape, rank_bound
    keep = min(rank, m, n, R)
    core = prices.svd * min(R, m) * min(R, n) * min(R, m, n)
    costs = {"factored": prices.double * ((m + n) * (4.0 * R * R + 2.0 * R * keep) + core)}
    if single and R / min(m, n) <= 0.75:
        grams = (m + n) * (1.5 * R * R + 1.0 * R * keep)
        costs["factored-gram"] = prices.double * (grams + core) + GRAM_OVERHEAD
    return costs


def dense_costs(
    shape: tuple[int, int], rank: int, prices: Prices, *, single: bool
) -> dict[str, float]:
    """Costs of the routes from a formed matrix; only the SVD is exact enough for float64."""
    small, large = min(shape), max(shape)
    r = min(rank, small)
    costs = {"dense-svd": prices.double * (prices.svd * small**3 + 6.0 * large * small**2)}
    if not single:
        return costs
    last = prices.double * (6.0 * (small + large) * r * r + prices.svd * r**3)
    last += 2.0 * small * large * r
    if 2 * r <= small:
        eigen = 2.0 * large * small**2 + prices.eigh * small**3
        costs["dense-eigh"] = prices.double * eigen + last
    D = 3.5 * r + 128.0
    if r / small <= LARGEST_SHARE_OF_RANK and D / small <= LARGEST_SHARE_OF_COLUMNS:
        products = prices.thin * 4.0 * small * large * D + (10.0 * small + 2.0 * large) * D * D
        costs["krylov"] = products + 2.5 * prices.eigh * D**3 + last
    return costs


def top_of_dense(
    M: Tensor, rank: int, *, dtype: torch.dtype, tolerance: float, route: str
) -> Solved:
    """The top ``rank`` directions of ``M [m, n]`` by ``route``, or by an exact one if it fails."""
    if M.shape[0] > M.shape[1] and route != "dense-svd":
        solved = top_of_dense(M.T, rank, dtype=dtype, tolerance=tolerance, route=route)
        svd = solved.svd
        turned = finished_svd(svd.Vh.T, svd.S, svd.U.T, dtype=dtype)
        return Solved(svd=turned, energy=solved.energy, route=solved.route, error=solved.error)
    if route == "krylov":
        return _by_krylov(M, rank, dtype, tolerance)
    if route == "dense-eigh":
        return _by_eigh(M, rank, dtype)
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    svd = finished_svd(U, S, Vh, dtype=dtype, rank=rank)
    return Solved(svd=svd, energy=float(S.square().sum()), route="dense-svd")


def _by_krylov(M: Tensor, rank: int, dtype: torch.dtype, tolerance: float) -> Solved:
    energy, small = squared_norm(M), min(M.shape)
    columns = int(LARGEST_SHARE_OF_COLUMNS * small)
    space = top_space(M, rank, energy=energy, tolerance=tolerance, max_columns=columns)
    if space is not None:
        error = _excess(energy=energy, kept=space.kept, missing=space.missing)
        if error <= tolerance:
            svd, _ = _svd_of_factors(space.left, space.right, rank, dtype)
            return Solved(svd=svd, energy=energy, route="krylov", error=error)
    exact = "dense-eigh" if 2 * rank <= small else "dense-svd"
    return top_of_dense(M, rank, dtype=dtype, tolerance=tolerance, route=exact)


def _excess(*, energy: float, kept: float, missing: float) -> float:
    """``|M - M~| / |M - M_r| - 1`` from the kept energy and from what is estimated to be missing.

    A tail below float32's rounding of ``M`` counts as that rounding.
    """
    tail = max(energy - kept, ALLOWED_LOSS**2 * energy)
    best = max(tail - missing, ALLOWED_LOSS**2 * energy)
    return (tail / best) ** 0.5 - 1.0 if best > 0 else 0.0


def _by_eigh(M: Tensor, rank: int, dtype: torch.dtype) -> Solved:
    _, vectors = torch.linalg.eigh(_row_gram(M))
    svd, _ = _inside(M, vectors[:, -rank:].flip(1), dtype)
    return Solved(svd=svd, energy=squared_norm(M), route="dense-eigh")


def _row_gram(M: Tensor) -> Tensor:
    """``M M^T`` in float64, a few columns of ``M`` at a time."""
    gram = torch.zeros(M.shape[0], M.shape[0], dtype=torch.float64, device=M.device)
    for part in M.split(1024, dim=1):
        gram += gram_matrix(part.T)
    return gram


def _inside(M: Tensor, U: Tensor, dtype: torch.dtype) -> tuple[FactoredSVD, float]:
    """The SVD of ``U U^T M`` and its energy; U is orthonormalised in float64 first.

    The product with M is made in the dtype of the U that came in, everything after it in float64.
    """
    basis = torch.linalg.qr(U.double())[0]
    inside = transposed_product(M, basis.to(U.dtype)).double().T
    return _svd_of_factors(basis, inside, basis.shape[1], dtype)


def _svd_of_factors(
    left: Tensor, right: Tensor, rank: int, dtype: torch.dtype
) -> tuple[FactoredSVD, float]:
    """The top of ``left @ right``, float64, and the energy of all of it."""
    ones = left.new_ones(1, left.shape[1])
    (found,) = svd_by_gram(left[None], ones, right[None], max_rank=rank, dtype=dtype)
    if found is not None:
        return found
    svd = svd_of_product(left, right)
    kept = float(svd.S.square().sum())
    return finished_svd(svd.U, svd.S, svd.Vh, dtype=dtype, rank=rank), kept
