"""Matrices kept as products: every claim against a dense float64 SVD of the formed matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from flexlora.algebra.linalg import (
    FactoredSVD,
    energy_kept,
    inner_product,
    live_rows,
    product_norm,
    stack_products,
    svd_of_product,
)

SHAPES = [(9, 7, 3), (7, 9, 3), (6, 5, 11), (5, 5, 5), (1, 8, 2), (8, 1, 2), (4, 6, 1)]


def product(m, n, k, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, k, generator=generator, dtype=torch.float64)
    right = torch.randn(k, n, generator=generator, dtype=torch.float64)
    return left.to(dtype), right.to(dtype)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_svd_of_product_is_the_dense_svd(m, n, k):
    left, right = product(m, n, k)
    svd = svd_of_product(left, right)
    dense = torch.linalg.svdvals(left @ right)
    assert svd.U.shape == (m, svd.rank) and svd.Vh.shape == (svd.rank, n)
    assert svd.rank == min(m, n, k)
    assert torch.all(svd.S[:-1] >= svd.S[1:]), "singular values are not nonincreasing"
    torch.testing.assert_close(svd.S, dense[: svd.rank], rtol=1e-12, atol=1e-13)
    eye = torch.eye(svd.rank, dtype=torch.float64)
    torch.testing.assert_close(svd.U.T @ svd.U, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(svd.Vh @ svd.Vh.T, eye, rtol=0, atol=1e-12)
    assert reference.relative_error(svd.to_dense(), left @ right) < 1e-13


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_truncation_is_the_best_approximation_of_its_rank(m, n, k):
    """Eckart-Young-Mirsky: the error equals the tail, and is the dense truncation's own."""
    left, right = product(m, n, k)
    whole, svd = left @ right, svd_of_product(left, right)
    for rank in range(1, svd.rank + 1):
        truncated = svd.truncate(rank).to_dense()
        tail = torch.linalg.svdvals(whole)[rank:]
        error = whole - truncated
        assert float(error.norm()) == pytest.approx(float(tail.norm()), rel=1e-9, abs=1e-12)
        top = float(tail[0]) if len(tail) else 0.0
        spectral = float(torch.linalg.matrix_norm(error, 2))
        assert spectral == pytest.approx(top, rel=1e-9, abs=1e-12)
        assert reference.relative_error(truncated, reference.truncate(whole, rank)) < 1e-10


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_truncation_is_nested(small, large, seed):
    svd = svd_of_product(*product(8, 7, 6, seed))
    small, large = sorted((small, large))
    once, twice = svd.truncate(small), svd.truncate(large).truncate(small)
    assert torch.equal(once.U, twice.U) and torch.equal(once.S, twice.S)
    assert torch.equal(once.Vh, twice.Vh)


def test_truncation_above_the_rank_is_the_matrix_itself():
    svd = svd_of_product(*product(8, 7, 3))
    assert torch.equal(svd.truncate(50).to_dense(), svd.to_dense())


def test_zero_matrix_has_no_directions():
    svd = svd_of_product(torch.zeros(5, 3), torch.zeros(3, 4))
    assert svd.rank == 0 and svd.shape == (5, 4)
    assert torch.equal(svd.to_dense(), torch.zeros(5, 4))
    assert torch.equal(svd.truncate(2).to_dense(), torch.zeros(5, 4))
    empty = svd_of_product(torch.zeros(5, 0), torch.zeros(0, 4))
    assert empty.rank == 0 and empty.shape == (5, 4)
    assert FactoredSVD.zero(5, 4, torch.float64).to_dense().dtype == torch.float64


@pytest.mark.parametrize("true_rank", [1, 2, 4])
def test_directions_below_rounding_are_dropped_from_a_rank_deficient_stack(true_rank):
    """Twenty terms inside one subspace stack to R = 40 but have ``true_rank`` directions."""
    left, right = product(30, 25, true_rank)
    terms = []
    for seed in range(20):
        inner = product(true_rank, true_rank, true_rank, seed)[0]
        terms.append((0.05, left @ inner, right))
    svd = svd_of_product(*stack_products(terms))
    assert svd.rank == true_rank
    dense = sum(weight * a @ b for weight, a, b in terms)
    assert reference.relative_error(svd.to_dense(), dense) < 1e-12


def test_small_but_real_directions_survive():
    """Ten orders of magnitude below the largest is far above float64's rounding."""
    scale = torch.tensor([1.0, 1e-5, 1e-10], dtype=torch.float64)
    left, _ = torch.linalg.qr(product(12, 9, 3)[0])
    right, _ = torch.linalg.qr(product(12, 9, 3)[1].T)
    svd = svd_of_product(left * scale, right.T)
    torch.testing.assert_close(svd.S, scale, rtol=1e-5, atol=0)


def test_signs_are_fixed_by_the_largest_entry_of_each_column_of_u():
    left, right = product(9, 7, 4)
    svd, negated = svd_of_product(left, right), svd_of_product(-left, -right)
    largest = svd.U.gather(0, svd.U.abs().argmax(dim=0, keepdim=True))
    assert torch.all(largest > 0)
    torch.testing.assert_close(negated.U, svd.U, rtol=0, atol=1e-12)


def test_computes_in_float64_and_returns_what_came_in():
    left, right = product(40, 30, 6, dtype=torch.float32)
    svd = svd_of_product(left, right)
    assert svd.U.dtype == svd.S.dtype == svd.Vh.dtype == torch.float32
    exact = torch.linalg.svdvals(left.double() @ right.double())[:6]
    torch.testing.assert_close(svd.S.double(), exact, rtol=2e-7, atol=0)


def test_inner_dimensions_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"left is \(5, 3\) and right \(2, 4\), expected"):
        svd_of_product(torch.ones(5, 3), torch.ones(2, 4))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_stack_of_unequal_ranks_is_the_weighted_sum(ranks, seed):
    terms = [(0.3 * (i + 1), *product(6, 8, k, seed + i)) for i, k in enumerate(ranks)]
    left, right = stack_products(terms)
    assert left.shape == (6, sum(ranks)) and right.shape == (sum(ranks), 8)
    expected = sum(weight * a @ b for weight, a, b in terms)
    torch.testing.assert_close(left @ right, expected, rtol=1e-12, atol=1e-12)


def test_a_weight_of_one_returns_the_blocks_own_bits():
    left, right = product(6, 8, 3, dtype=torch.float32)
    stacked = stack_products([(1.0, left, right)])
    assert torch.equal(stacked[0].float(), left) and torch.equal(stacked[1].float(), right)


def test_inner_product_and_norm_are_those_of_the_dense_matrices():
    first, second = product(9, 7, 3, 1), product(9, 7, 5, 2)
    dense = float(((first[0] @ first[1]) * (second[0] @ second[1])).sum())
    assert inner_product(*first, *second) == pytest.approx(dense, rel=1e-12)
    norm = float((first[0] @ first[1]).norm())
    assert product_norm(*first) == pytest.approx(norm, rel=1e-12)
    assert product_norm(torch.zeros(3, 2), torch.zeros(2, 4)) == 0.0


def test_gram_matrices_are_float64_whatever_comes_in():
    """A norm whose terms cancel: float32 Gram matrices lose it, float64 ones keep it."""
    a, b = torch.randn(200, 1, generator=torch.Generator().manual_seed(3)), torch.ones(1, 300)
    left = torch.cat([a, -a + 1e-3], dim=1)
    right = torch.cat([b, b], dim=0)
    expected = float((left.double() @ right.double()).norm())
    assert product_norm(left, right) == pytest.approx(expected, rel=1e-8)
    gram = (left.T @ left) * (right @ right.T)
    single = max(float(gram.sum()), 0.0) ** 0.5
    assert abs(single - expected) / expected > 1e-6, "the case is too easy to need float64"


@given(st.lists(st.floats(0, 1e3), min_size=0, max_size=8), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_energy_kept_is_the_share_of_squared_singular_values(values, rank):
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    kept = energy_kept(S, rank)
    total = float(np.sum(S.numpy() ** 2))
    expected = float(np.sum(S.numpy()[:rank] ** 2)) / total if total > 0 else 1.0
    assert kept == pytest.approx(expected, rel=1e-12)
    assert 0.0 <= kept <= 1.0 + 1e-15
    assert kept <= energy_kept(S, rank + 1) + 1e-15


def test_energy_kept_of_float32_values_is_computed_in_float64():
    """A thousand small values beside a large one vanish when float32 adds them."""
    S = torch.cat([torch.tensor([4096.0]), torch.full((1000,), 0.5)])
    exact = 4096.0**2 / (4096.0**2 + 1000 * 0.25)
    assert energy_kept(S, 1) == pytest.approx(exact, rel=1e-12)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_live_rows_are_nested_bounded_and_never_zero(small, large, in_features, seed):
    small, large = sorted((small, large))
    rows = [live_rows(n, in_features, torch.Generator().manual_seed(seed)) for n in (small, large)]
    assert torch.equal(rows[0], rows[1][:small])
    assert float(rows[1].abs().max()) <= in_features**-0.5
    assert torch.all(rows[1].norm(dim=1) > 0)
