"""The best approximation of a sum, by every route, against a dense float64 SVD of the sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.algebra import decompose as module
from flexlora.algebra import gram
from flexlora.algebra.decompose import MatrixSum, decompose, dense_pays, fold
from flexlora.algebra.linalg import inner_product
from flexlora.algebra.routes import choose_route
from spectra import check_form, excess, gaussian, with_spectrum

EXACT = ("factored", "factored-gram", "dense-svd", "dense-eigh")


def single(*terms):
    return tuple((weight, left.float(), right.float()) for weight, left, right in terms)


def parallel_stack(m, n, noise):
    """Eight clients that start from the same factors and move a little: nearly parallel columns."""
    left, right = with_spectrum(torch.logspace(0, -2, 6), m, n)
    return single(
        *(
            (0.125, left + noise * gaussian(m, 6, seed=i), right + noise * gaussian(6, n, seed=-i))
            for i in range(1, 9)
        )
    )


def cancellation(m, n, size):
    """``G + trained - start``: what is left is ``size`` of what is added and subtracted."""
    left, right = with_spectrum(torch.logspace(0, -1, 6), m, n)
    move, rows = size * gaussian(m, 3, seed=7) / m**0.5, gaussian(3, n, seed=8) / n**0.5
    trained = torch.cat([left, move], dim=1), torch.cat([right, rows])
    return single((1.0, *trained), (-1.0, left, right), (1e-3 * size, left, right))


CASES = {
    "fast decay": ((60, 50), single((1.0, *with_spectrum(torch.logspace(0, -5, 20), 60, 50)))),
    "flat": (
        (48, 64),
        single(*((0.5, gaussian(48, 8), gaussian(8, 64, seed=i)) for i in range(4))),
    ),
    "rank-deficient": ((40, 30), single(*((0.2, gaussian(40, 3), gaussian(3, 30)),) * 5)),
    "nearly parallel": ((60, 50), parallel_stack(60, 50, 1e-3)),
    "parallel to rounding": ((60, 50), parallel_stack(60, 50, 0.0)),
    "cancelling": ((60, 50), cancellation(60, 50, 1e-3)),
    "wide": ((9, 200), single((1.0, gaussian(9, 5), gaussian(5, 200)))),
    "tall": ((200, 9), single((1.0, gaussian(200, 5), gaussian(5, 9)))),
    "one row": ((1, 30), single((2.0, gaussian(1, 4), gaussian(4, 30)))),
    "one column": ((30, 1), single((2.0, gaussian(30, 4), gaussian(4, 1)))),
    "unequal weights": (
        (40, 30),
        single(*((10.0 ** -(2 * i), gaussian(40, 3, seed=i), gaussian(3, 30)) for i in range(4))),
    ),
}


def formed(terms, shape):
    total = torch.zeros(shape, dtype=torch.float64)
    for weight, left, right in terms:
        total += weight * (left.double() @ right.double())
    return total


def decompose_by(monkeypatch, route, matrix, **options):
    with monkeypatch.context() as patch:
        patch.setattr(module, "choose_route", lambda *args, **kwargs: route)
        return decompose({"x": matrix}, **options)["x"]


@pytest.mark.parametrize("case", CASES)
def test_the_energy_of_a_sum_is_that_of_its_entries(case):
    """With terms alone, with a dense part beside them, and of nothing."""
    shape, terms = CASES[case]
    dense = gaussian(*shape).float()
    for matrix in (
        MatrixSum(shape=shape, terms=terms),
        MatrixSum(shape=shape, terms=terms, dense=dense),
        MatrixSum(shape=shape, dense=dense),
    ):
        expected = float(matrix.to_dense(torch.float64).square().sum())
        assert matrix.energy() == pytest.approx(expected, rel=1e-6)
    assert MatrixSum(shape=shape).energy() == 0.0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("route", EXACT)
def test_every_exact_route_is_the_dense_truncation(monkeypatch, route, case):
    shape, terms = CASES[case]
    M = formed(terms, shape)
    for rank in (1, 3, 5):
        matrix = MatrixSum(shape=shape, terms=terms)
        result = decompose_by(monkeypatch, route, matrix, max_rank=rank, dtype=torch.float32)
        assert result.svd.rank == min(rank, int((torch.linalg.svdvals(M) > 1e-6 * M.norm()).sum()))
        check_form(result.svd, shape, torch.float32, atol=2e-6)
        assert excess(result, M, rank) < 3e-6
        assert result.energy == pytest.approx(float(M.square().sum()), rel=1e-9)
        assert result.error == 0.0 and result.route in EXACT and result.seconds > 0


@pytest.mark.parametrize("case", CASES)
def test_float64_is_exact(case):
    shape, terms = CASES[case]
    terms = tuple((weight, left.double(), right.double()) for weight, left, right in terms)
    M = formed(terms, shape)
    for dense in (None, gaussian(*shape, seed=5)):
        matrix = MatrixSum(shape=shape, terms=terms, dense=dense)
        expected = M if dense is None else M + dense
        result = decompose({"x": matrix}, max_rank=1 << 30, dtype=torch.float64)["x"]
        check_form(result.svd, shape, torch.float64, atol=1e-12)
        rebuilt = result.svd.to_dense()
        # What is summed rounds at the size of the terms, not of what is left of them.
        size = max(float(left.norm() * right.norm() * abs(w)) for w, left, right in terms)
        assert float((rebuilt - expected).norm()) < 1e-12 * max(size, float(expected.norm()))


def test_zero_matrices_have_no_directions():
    zeros = {
        "no terms": MatrixSum(shape=(5, 4)),
        "zero factors": MatrixSum(
            shape=(5, 4), terms=single((1.0, gaussian(5, 2), 0 * gaussian(2, 4)))
        ),
        "rank 0": MatrixSum(shape=(5, 4), terms=single((1.0, gaussian(5, 0), gaussian(0, 4)))),
        "dense": MatrixSum(shape=(5, 4), dense=torch.zeros(5, 4)),
    }
    for name, result in decompose(zeros, max_rank=3, dtype=torch.float32).items():
        assert result.svd.rank == 0 and result.svd.shape == (5, 4), name
        assert result.energy == result.error == 0.0, name


def hidden(m, n):
    """Two stacks 1e-9 apart, one subtracted: below the root of float64's rounding."""
    left, right = with_spectrum(torch.logspace(0, -1, 6), m, n)
    moved = left + 1e-9 * gaussian(m, 6, seed=7)
    return (1.0, moved, right), (-1.0, left, right)


def test_gram_gives_way_to_qr_where_it_cannot_see(monkeypatch):
    shape, terms = (60, 50), hidden(60, 50)
    M, matrix = formed(terms, shape), MatrixSum(shape=shape, terms=terms)
    options = {"max_rank": 4, "dtype": torch.float32}
    result = decompose_by(monkeypatch, "factored-gram", matrix, **options)
    assert result.route == "factored" and excess(result, M, 4) < 1e-5
    monkeypatch.setattr(gram, "LEFT_OUT", float("inf"))
    monkeypatch.setattr(gram, "ORTHOGONALITY", float("inf"))
    unchecked = decompose_by(monkeypatch, "factored-gram", matrix, **options)
    assert unchecked.route == "factored-gram" and excess(unchecked, M, 4) > 1e-2


def test_gram_is_kept_where_columns_are_nearly_parallel(monkeypatch):
    for case in ("nearly parallel", "parallel to rounding", "flat", "unequal weights"):
        shape, terms = CASES[case]
        matrix = MatrixSum(shape=shape, terms=terms)
        result = decompose_by(monkeypatch, "factored-gram", matrix, max_rank=5, dtype=torch.float32)
        assert result.route == "factored-gram", case


def test_energy_needs_float64():
    """A sum whose terms cancel: float32 Gram matrices misread its energy, the result does not."""
    shape, terms = (60, 50), cancellation(60, 50, 1e-3)
    exact = float(formed(terms, shape).square().sum())
    result = decompose({"x": MatrixSum(shape=shape, terms=terms)}, max_rank=2, dtype=torch.float32)
    assert result["x"].energy == pytest.approx(exact, rel=1e-9)
    left = torch.cat([weight * left for weight, left, _ in terms], dim=1)
    right = torch.cat([right for *_, right in terms])
    assert inner_product(left, right, left, right) == pytest.approx(exact, rel=1e-6)
    in_float32 = float(((left.T @ left) * (right @ right.T)).sum())
    assert abs(in_float32 - exact) > 1e-3 * exact, "the case is too easy to need float64"


@pytest.mark.parametrize(
    ("shape", "rank_bound", "rank", "dtype", "has_dense", "route"),
    [
        ((4096, 4096), 368, 368, torch.float32, False, "factored-gram"),
        ((4096, 11008), 368, 64, torch.float32, False, "factored-gram"),
        ((4096, 4096), 368, 368, torch.float64, False, "factored"),
        ((2048, 2048), 2352, 200, torch.float32, False, "krylov"),
        ((2048, 2048), 0, 200, torch.float32, True, "krylov"),
        ((2048, 5504), 0, 200, torch.float32, True, "krylov"),
        ((2048, 2048), 0, 700, torch.float32, True, "dense-eigh"),
        ((2048, 2048), 0, 1 << 30, torch.float32, True, "dense-svd"),
        ((2048, 2048), 0, 200, torch.float64, True, "dense-svd"),
        ((64, 64), 400, 16, torch.float32, False, "dense-eigh"),
        ((64, 64), 400, 64, torch.float64, False, "dense-svd"),
        ((64, 64), 0, 16, torch.float32, False, "zero"),
    ],
)
def test_the_cost_model_chooses(shape, rank_bound, rank, dtype, has_dense, route):
    assert choose_route(shape, rank_bound, rank, dtype, has_dense=has_dense) == route


def test_a_batch_equals_its_matrices_one_by_one(monkeypatch):
    sizes, solve = [], module.svds_of_products
    monkeypatch.setattr(
        module,
        "svds_of_products",
        lambda left, right: sizes.append(len(left)) or solve(left, right),
    )
    matrices = {
        f"{i}.{n}": MatrixSum(
            shape=(20, n), terms=((1.0, gaussian(20, 4, seed=i), gaussian(4, n, seed=-1 - i)),)
        )
        for i in range(5)
        for n in (16, 24)
    }
    together = decompose(matrices, max_rank=3, dtype=torch.float64)
    again = decompose(matrices, max_rank=3, dtype=torch.float64)
    assert sizes == [5, 5, 5, 5] and list(together) == list(matrices)
    for name, matrix in matrices.items():
        alone = decompose({"x": matrix}, max_rank=3, dtype=torch.float64)["x"].svd
        torch.testing.assert_close(together[name].svd.to_dense(), alone.to_dense())
        for label in ("U", "S", "Vh"):
            got = getattr(together[name].svd, label)
            assert torch.equal(got, getattr(again[name].svd, label))


def test_one_bad_matrix_of_a_batch_does_not_cost_the_others_their_route(monkeypatch):
    shape = (60, 50)
    good = (0.5, gaussian(60, 12), gaussian(12, 50))
    matrices = {
        "good": MatrixSum(shape=shape, terms=(good,)),
        "bad": MatrixSum(shape=shape, terms=hidden(*shape)),
    }
    monkeypatch.setattr(module, "choose_route", lambda *args, **kwargs: "factored-gram")
    results = decompose(matrices, max_rank=5, dtype=torch.float32)
    assert results["good"].route == "factored-gram" and results["bad"].route == "factored"
    for name, matrix in matrices.items():
        assert excess(results[name], formed(matrix.terms, shape), 5) < 1e-5


@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.lists(st.integers(1, 6), max_size=4),
    st.integers(1, 16),
    st.booleans(),
    st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_any_sum_is_approximated_best(m, n, ranks, max_rank, has_dense, seed):
    terms = single(
        *(
            (0.3 * (i + 1), gaussian(m, k, seed=seed + i), gaussian(k, n, seed=seed + 50 + i))
            for i, k in enumerate(ranks)
        )
    )
    dense = gaussian(m, n, seed=seed + 99).float() if has_dense else None
    M = formed(terms, (m, n)) + (dense.double() if has_dense else 0.0)
    before = dense.clone() if has_dense else None
    matrix = MatrixSum(shape=(m, n), terms=terms, dense=dense)
    result = decompose({"x": matrix}, max_rank=max_rank, dtype=torch.float32)["x"]
    if has_dense:
        assert torch.equal(dense, before), "the caller's accumulator was written to"
    if float(M.norm()) == 0.0:
        assert result.svd.rank == 0
        return
    assert result.svd.rank <= max_rank
    assert excess(result, M, max_rank) < 3e-6
    # Terms may cancel: float32 rounds each of them, not their sum.
    sizes = sum(abs(w) * float((L.double() @ R.double()).norm()) for w, L, R in terms)
    sizes += float(dense.double().norm()) if has_dense else 0.0
    assert abs(result.energy - float(M.square().sum())) < 1e-6 * sizes**2


def test_fold_is_the_sum_in_place_and_of_the_right_dtype():
    terms = [(0.1 * i, gaussian(30, 300, seed=i), gaussian(300, 20, seed=-i)) for i in range(1, 8)]
    dense = gaussian(30, 20, seed=9)
    expected = dense + formed(terms, (30, 20))
    folded = fold(dense, iter(terms), (30, 20))
    assert folded is dense
    torch.testing.assert_close(folded, expected, rtol=1e-12, atol=1e-10)
    assert fold(None, single(*terms), (30, 20)).dtype == torch.float64
    torch.testing.assert_close(fold(None, terms, (30, 20)), formed(terms, (30, 20)))
    assert torch.equal(fold(None, [], (3, 2)), torch.zeros(3, 2, dtype=torch.float64))
    wide = [(1.0, gaussian(1024, 1), gaussian(1, 1025))]
    assert fold(None, wide, (1024, 1025)).dtype == torch.float32
    assert (
        fold(None, [(1.0, gaussian(1024, 1), gaussian(1, 1024))], (1024, 1024)).dtype
        == torch.float64
    )


def test_dense_pays_from_the_rank_at_which_factors_hold_more_numbers():
    assert not dense_pays((100, 100), 50) and dense_pays((100, 100), 51)
    assert dense_pays((1, 1000), 1) and not dense_pays((1000, 1000), 499)


def test_a_sum_whose_parts_do_not_fit_is_refused():
    with pytest.raises(
        ValueError, match=r"term 1 is \(5, 3\) @ \(2, 4\), expected \[5, k\] @ \[k, 4\]"
    ):
        good = (1.0, gaussian(5, 2), gaussian(2, 4))
        MatrixSum(shape=(5, 4), terms=(good, (1.0, gaussian(5, 3), gaussian(2, 4))))
    with pytest.raises(ValueError, match=r"dense is \(4, 5\), expected \(5, 4\)"):
        MatrixSum(shape=(5, 4), dense=gaussian(4, 5))
    for options in ({"max_rank": 0}, {"max_rank": 1, "tolerance": 0.0}):
        with pytest.raises(ValueError, match="expected at least 1 and above 0"):
            decompose({}, dtype=torch.float32, **options)
