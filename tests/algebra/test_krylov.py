"""The Krylov route keeps its contract or gives way: checked against a dense float64 SVD."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexlora.algebra import gram, krylov, routes
from flexlora.algebra.decompose import MatrixSum, decompose
from flexlora.algebra.gram import (
    columns_in_float64,
    in_two_dtypes,
    product,
    squared_norm,
    transposed_product,
)
from flexlora.algebra.krylov import top_space
from flexlora.algebra.routes import top_of_dense
from spectra import check_form, excess, gaussian, with_spectrum

RANK = 24


def spectrum(kind, size):
    j = torch.arange(1, size + 1, dtype=torch.float64)
    head, tail = torch.ones(RANK, dtype=torch.float64), torch.ones(size - RANK, dtype=torch.float64)
    return {
        "power law": 1.0 / j,
        "slow power law": j**-0.3,
        "exponential": torch.exp(-j / 8.0),
        "step": torch.cat([head, 0.1 * tail]),
        "wide cluster": torch.cat([head, head, head, head, 0.05 * torch.ones(size - 4 * RANK)]),
        "steep, then flat": torch.cat([torch.logspace(0, -5, RANK), 2e-6 * tail]),
        "rank below the wanted": torch.cat([head[:10], 0.0 * tail, head[10:] * 0.0]),
    }[kind]


KINDS = (
    "power law",
    "slow power law",
    "exponential",
    "step",
    "wide cluster",
    "steep, then flat",
    "rank below the wanted",
)


def matrix(kind, m, n, dtype=torch.float32):
    if kind == "gaussian":
        return gaussian(m, n).to(dtype)
    left, right = with_spectrum(spectrum(kind, min(m, n)), m, n)
    return (left @ right).to(dtype)


def true_excess(solved, M, rank):
    """``|M - M~| / |M - M_r| - 1`` with a tail below float32's rounding counted as that."""
    M, svd = M.double(), solved.svd
    floor = 1e-6 * float(M.norm())
    best = max(float(torch.linalg.svdvals(M)[rank:].norm()), floor)
    missed = float((M - (svd.U.double() * svd.S.double()) @ svd.Vh.double()).norm())
    return missed / best - 1.0


def by_krylov(M, rank=RANK, tolerance=1e-4):
    return top_of_dense(M, rank, dtype=torch.float32, tolerance=tolerance, route="krylov")


@pytest.mark.parametrize("shape", [(256, 320), (320, 256)])
@pytest.mark.parametrize("kind", (*KINDS, "gaussian"))
def test_the_contract_holds(monkeypatch, kind, shape):
    monkeypatch.setattr(routes, "LARGEST_SHARE_OF_COLUMNS", 0.9)
    M = matrix(kind, *shape)
    for tolerance in (1e-2, 1e-4):
        solved = by_krylov(M, tolerance=tolerance)
        assert true_excess(solved, M, RANK) <= tolerance
        assert 0.0 <= solved.error <= tolerance
        assert solved.energy == pytest.approx(float(M.double().square().sum()), rel=1e-12)
        check_form(solved.svd, shape, torch.float32, atol=2e-6)
        assert solved.route == "krylov"


@pytest.mark.parametrize("kind", ["power law", "slow power law", "gaussian"])
def test_the_estimated_error_is_no_less_than_the_true_one(kind):
    """At loose tolerances, where both are far above rounding and the space is stopped early."""
    M = matrix(kind, 400, 400)
    for tolerance in (1e-1, 1e-2, 1e-3):
        solved = by_krylov(M, tolerance=tolerance)
        assert solved.route == "krylov"
        assert true_excess(solved, M, RANK) <= solved.error + 1e-6


def test_a_looser_tolerance_takes_fewer_columns():
    M = matrix("gaussian", 400, 500)
    options = {"energy": squared_norm(M), "max_columns": 400}
    columns = [top_space(M, RANK, tolerance=t, **options).columns for t in (1e-2, 1e-4, 1e-6)]
    assert columns[0] < columns[1] < columns[2]


def test_an_exact_route_follows_where_the_budget_is_not_enough(monkeypatch):
    M = matrix("gaussian", 256, 320)
    monkeypatch.setattr(routes, "LARGEST_SHARE_OF_COLUMNS", 0.2)
    energy = squared_norm(M)
    assert top_space(M, RANK, energy=energy, tolerance=1e-4, max_columns=51) is None
    solved = by_krylov(M)
    assert solved.route == "dense-eigh" and solved.error == 0.0
    assert abs(true_excess(solved, M, RANK)) < 1e-6
    assert by_krylov(M, rank=200).route == "dense-svd"


def product_dtypes(monkeypatch):
    """The dtypes that spaces are begun with, in their order, filled in by what runs next."""
    begun, begin = [], krylov._Space.__init__

    def spy(space, M, rank, max_columns, products):
        begun.append(products)
        begin(space, M, rank, max_columns, products)

    monkeypatch.setattr(krylov._Space, "__init__", spy)
    return begun


def test_float32_that_would_blur_the_smallest_directions_gives_way_to_float64(monkeypatch):
    M, begun = matrix("steep, then flat", 600, 620), product_dtypes(monkeypatch)
    assert true_excess(by_krylov(M, tolerance=1e-5), M, RANK) <= 1e-5
    assert begun[-1] == torch.float64
    monkeypatch.setattr(krylov, "BLUR", 0.0)
    monkeypatch.setattr(krylov, "BASIS_BLUR", 0.0)
    blurred = by_krylov(M, tolerance=1e-5)
    assert begun[-1] == torch.float32 and blurred.route == "krylov"
    assert true_excess(blurred, M, RANK) > 1e-5, "the case is too easy to need float64"


def test_a_small_tail_is_refined_in_float64_or_done_in_it(monkeypatch):
    """Where refinement is not let settle, the whole space is float64; both keep the contract."""
    S = torch.arange(1, 601, dtype=torch.float64) ** -2.0
    S[RANK:] *= 0.1
    left, right = with_spectrum(S, 600, 620)
    M, begun = (left @ right).float(), product_dtypes(monkeypatch)
    refined = by_krylov(M)
    assert torch.float64 not in begun and refined.route == "krylov"
    assert true_excess(refined, M, RANK) <= refined.error + 1e-6 and refined.error <= 1e-4
    monkeypatch.setattr(krylov, "REFINEMENTS", 0)
    double = by_krylov(M)
    assert begun[-1] == torch.float64 and double.route == "krylov"
    assert true_excess(double, M, RANK) <= 1e-4


@pytest.mark.parametrize("gap", [0.5, 0.1, 0.01])
def test_what_rounding_mixes_in_is_not_underestimated(gap):
    """Against the energy that the wanted eigenvectors of a disturbed diagonal keep of it."""
    size, rank, noise = 120, 20, 2e-3
    exact = torch.ones(size, dtype=torch.float64) - gap
    exact[-rank:] = 1.0
    disturbance = noise * gaussian(size, size)
    values, vectors = torch.linalg.eigh(
        torch.diag(exact) + (disturbance + disturbance.T) / 2.0**0.5
    )
    wanted = vectors[:, -rank:].flip(1)
    gram = wanted.T @ (exact[:, None] * wanted)
    lost = float(exact[-rank:].sum() - gram.trace())
    assert lost <= krylov._mixed_in(values, gram, rank) <= 100.0 * lost


def test_bfloat16_products_keep_the_contract_where_they_are_used(monkeypatch):
    """On any machine, a cluster's close followers included: the float32 spaces are never begun."""
    monkeypatch.setattr(krylov, "_product_dtypes", lambda M: iter([torch.bfloat16]))
    S = torch.ones(400, dtype=torch.float64)
    S[49:] = 0.98
    left, right = with_spectrum(S, 400, 450)
    for M in ((left @ right).float(), matrix("gaussian", 400, 450)):
        solved = by_krylov(M)
        assert solved.route == "krylov"
        assert true_excess(solved, M, RANK) <= min(solved.error + 1e-6, 1e-4)


def test_fresh_probes_find_what_the_space_cannot_reach(monkeypatch):
    """Two blocks that do not touch, and a start that lies in one: only a probe sees the other."""
    M = torch.zeros(400, 400)
    M[:200, :200] = matrix("power law", 200, 200) * 0.1
    M[200:, 200:] = matrix("power law", 200, 200)
    honest = krylov._Space._random

    def blind(space, rows, columns):
        draw = honest(space, rows, columns)
        if space.size == 0:
            draw[:, 200:] = 0.0
        return draw

    monkeypatch.setattr(krylov._Space, "_random", blind)
    monkeypatch.setattr(routes, "LARGEST_SHARE_OF_COLUMNS", 0.9)
    solved = by_krylov(M)
    assert solved.route == "krylov" and true_excess(solved, M, RANK) <= 1e-4
    monkeypatch.setattr(krylov._Space, "misses", lambda *args: False)
    assert true_excess(by_krylov(M), M, RANK) > 1.0, "the start was not blind"


def test_the_same_call_gives_the_same_bits_and_no_global_generator_moves():
    M = matrix("power law", 256, 320)
    before = torch.random.get_rng_state()
    first, second = by_krylov(M), by_krylov(M)
    assert torch.equal(torch.random.get_rng_state(), before)
    for label in ("U", "S", "Vh"):
        assert torch.equal(getattr(first.svd, label), getattr(second.svd, label))


def test_decompose_takes_it_for_a_large_dense_sum():
    m = n = 1100  # above 2^20 entries: a float32 accumulator
    terms = tuple(
        (0.1, gaussian(m, 150, seed=i).float(), gaussian(150, n, seed=-1 - i).float())
        for i in range(8)
    )
    matrix_sum = MatrixSum(shape=(m, n), terms=terms)
    result = decompose({"x": matrix_sum}, max_rank=40, dtype=torch.float32)["x"]
    M = sum(weight * (left.double() @ right.double()) for weight, left, right in terms)
    assert result.route == "krylov"
    assert excess(result, M, 40) <= 1e-4


@given(st.integers(60, 160), st.integers(60, 160), st.floats(0.0, 3.0), st.integers(0, 10**6))
@example(m=156, n=156, power=0.125, seed=156)  # fell short by 0.3 % without a margin
@settings(max_examples=20, deadline=None)
def test_any_decay_keeps_the_contract(m, n, power, seed):
    S = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power
    left, right = with_spectrum(S, m, n, seed=seed)
    M = (left @ right).float()
    solved = by_krylov(M, rank=10)
    assert true_excess(solved, M, 10) <= 1e-4


def test_products_in_float64_make_no_copy_of_the_matrix(monkeypatch):
    monkeypatch.setattr(gram, "ENTRIES_AT_ONCE", 1000)
    M, X = gaussian(70, 90).float(), gaussian(70, 5, seed=1)
    torch.testing.assert_close(transposed_product(M, X), M.double().T @ X, rtol=1e-12, atol=1e-12)
    Y = gaussian(90, 5, seed=2)
    torch.testing.assert_close(product(M, Y), M.double() @ Y, rtol=1e-12, atol=1e-12)
    assert squared_norm(M) == pytest.approx(float(M.double().square().sum()), rel=1e-14)
    single = float(M.square().sum())
    assert squared_norm(M) != single


def test_float32_takes_the_columns_whose_energy_it_can_tell():
    M = matrix("power law", 300, 400)
    U = torch.linalg.svd(M.double())[0][:, :40]
    exact = transposed_product(M, U)
    values = exact.square().sum(dim=0).flip(0)
    counts = []
    for allowed in (1e-14, 1e-8, 5e-8, 1.0):
        double = columns_in_float64(values, allowed, length=400)
        mixed = in_two_dtypes(transposed_product, M, U, double)
        torch.testing.assert_close(mixed[:, :double], exact[:, :double], rtol=1e-13, atol=1e-14)
        assert abs(float(mixed.square().sum() - exact.square().sum())) <= allowed
        counts.append(double)
    assert counts[0] == 40 > counts[1] > counts[2] > counts[3] == 0
    single = transposed_product(M, U.float()).double()
    assert abs(float(single.square().sum() - exact.square().sum())) > 1e-9, "nothing to tell"
