"""Robust rules on Gram matrices against flattened dense changes, and against ByzFL where it is.

ByzFL is no dependency of the tests: these comparisons run where it can be imported.
"""

from __future__ import annotations

import math

import pytest
import torch

import builders
import reference
from flexlora.aggregation.engine.change_gram import change_gram
from flexlora.aggregation.engine.robust_rules import (
    RULES,
    RobustMean,
    _clipping_step,
    _distances_to,
    _weiszfeld_step,
    mixed,
    multi_krum,
    nearest_means,
    squared_distances,
    trimmed_mean,
)
from flexlora.aggregation.engine.waiting import StoredAdapter

N, F, WIDTH = 11, 2, 40


def changes(seed=0, *, n=N, hostile=0, size=1.0):
    """Honest rows around one mean; the first ``hostile`` ones at ``size`` times minus it."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    rows = mean + 0.5 * torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    rows[:hostile] = -size * rows[:hostile]
    return rows


def applied(rule, rows, hostile=F):
    return rule(rows @ rows.T, hostile) @ rows


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_rule_is_the_dense_one(rule, size):
    for seed in range(3):
        rows = changes(seed, hostile=F, size=size)
        expected = reference.ROBUST[rule](rows, F)
        assert reference.relative_error(applied(RULES[rule], rows), expected) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_coefficients_sum_to_one_and_only_the_trimmed_mean_has_negative_ones(rule):
    for seed in range(5):
        gram = changes(seed, hostile=F, size=3.0) @ changes(seed, hostile=F, size=3.0).T
        c = RULES[rule](gram, F)
        assert float(c.sum()) == pytest.approx(1.0, abs=1e-9)
        assert rule == "nearest-trimmed-mean" or float(c.min()) >= 0.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1.0, 10.0, 1e6, 1e15])
def test_no_hostile_update_moves_the_result_far_however_large_it_is(rule, size):
    rows = changes(1, hostile=F, size=size)
    honest = rows[F:].mean(dim=0)
    spread = math.sqrt(WIDTH) * 0.5
    assert float((applied(RULES[rule], rows) - honest).norm()) < spread
    assert float((rows.mean(dim=0) - honest).norm()) > 1.0, "the plain mean is moved"


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_moves_with_the_changes_and_turns_with_them(rule):
    rows, shift = changes(2, hostile=F, size=4.0), torch.arange(WIDTH, dtype=torch.float64)
    turn = torch.linalg.qr(changes(3, n=WIDTH))[0]
    result = applied(RULES[rule], rows)
    assert reference.relative_error(applied(RULES[rule], rows + shift), result + shift) < 1e-6
    assert reference.relative_error(applied(RULES[rule], rows @ turn), result @ turn) < 1e-6
    assert reference.relative_error(applied(RULES[rule], 7.0 * rows), 7.0 * result) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_the_names_of_the_clients_do_not_matter(rule):
    rows, order = changes(4, hostile=F, size=2.0), torch.randperm(N)
    assert (
        reference.relative_error(applied(RULES[rule], rows[order]), applied(RULES[rule], rows))
        < 1e-6
    )


@pytest.mark.parametrize("rule", RULES)
def test_equal_changes_and_zero_changes_are_their_own_mean(rule):
    row = changes(5)[:1]
    assert reference.relative_error(applied(RULES[rule], row.expand(N, -1)), row[0]) < 1e-12
    assert float(applied(RULES[rule], torch.zeros(N, WIDTH, dtype=torch.float64)).abs().max()) == 0


@pytest.mark.parametrize("rule", RULES)
def test_where_most_changes_are_equal_the_result_is_they(rule):
    rows = changes(6, hostile=F, size=9.0)
    rows[F:] = rows[F]
    assert reference.relative_error(applied(RULES[rule], rows), rows[F]) < 1e-6


def test_of_equal_scores_the_first_clients_are_chosen():
    rows = torch.eye(5, dtype=torch.float64)
    gram = rows @ rows.T
    assert multi_krum(gram, 1).tolist() == [0.25, 0.25, 0.25, 0.25, 0.0]
    means = nearest_means(gram, 1)
    assert means[4].tolist() == [0.25, 0.25, 0.25, 0.0, 0.25], "itself, then the first ones"
    assert torch.equal(means.diagonal(), torch.full((5,), 0.25, dtype=torch.float64))


def test_rounding_makes_no_distance_negative_or_nan():
    row = changes(7)[:1] * 1e8
    rows = row.expand(4, -1) + 1e-7 * changes(8, n=4)
    distances = squared_distances(rows @ rows.T)
    assert float(distances.min()) == 0.0 and not bool(distances.sqrt().isnan().any())
    for rule in RULES.values():
        assert bool(torch.isfinite(rule(rows @ rows.T, 1)).all())


def test_the_fewest_updates_of_a_rule():
    assert RobustMean(rule="multi-krum", hostile=2).least == 7
    assert RobustMean(rule="geometric-median", hostile=2).least == 5
    assert RobustMean(rule="centred-clipping", hostile=0).least == 1


def test_an_update_that_is_left_out_has_no_weight_of_rounding():
    rows = changes(13, hostile=F, size=1000.0)
    c = RobustMean(rule="nearest-trimmed-mean", hostile=F).coefficients(rows @ rows.T)
    assert c[:F].tolist() == [0.0] * F and float(c.sum()) == pytest.approx(1.0, abs=1e-9)


def test_one_update_is_its_own_mean():
    rows = changes(9, n=1)
    for rule in RULES.values():
        assert reference.relative_error(applied(rule, rows, hostile=0), rows[0]) < 1e-12


# --- ByzFL ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byzfl():
    return pytest.importorskip("byzfl.aggregators", exc_type=ImportError)


def of_equal_ranks(size):
    """The Gram matrix of changes of one rank, from their factors, and the changes as dense rows."""
    shapes = {"attn.q": (12, 12), "mlp.up": (20, 12)}
    start = builders.random_adapter(shapes, 4, seed=99)
    adapters = [builders.random_adapter(shapes, 4, seed=k) for k in range(N)]
    for k in range(F):
        adapters[k] = adapters[k].map(lambda tensor: size**0.5 * tensor)
    stored = [StoredAdapter(adapter=adapter) for adapter in adapters]
    gram = change_gram(stored, [StoredAdapter(adapter=start)], [0] * N, list(shapes))
    return gram, reference.flat_changes(adapters, [start] * N)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_multi_krum_and_nearest_mixing_are_byzfls(byzfl, size):
    """ByzFL casts torch's tensors to float32, numpy's arrays not."""
    gram, rows = of_equal_ranks(size)
    expected = torch.from_numpy(byzfl.MultiKrum(f=F)(rows.numpy()))
    assert reference.relative_error(multi_krum(gram, F) @ rows, expected) < 1e-12
    expected = torch.from_numpy(byzfl.NNM(f=F)(rows.numpy()))
    assert reference.relative_error(nearest_means(gram, F) @ rows, expected) < 1e-12
    expected = torch.from_numpy(byzfl.MultiKrum(f=F)(expected.numpy()))
    assert reference.relative_error(mixed(multi_krum)(gram, F) @ rows, expected) < 1e-12


def test_the_trimmed_mean_is_byzfls_in_the_principal_axes(byzfl):
    gram, rows = of_equal_ranks(3.0)
    origin, axes = reference.axes_of(rows)
    trimmed = torch.from_numpy(byzfl.TrMean(f=F)(((rows - origin) @ axes).numpy()))
    expected = origin + axes @ trimmed
    assert reference.relative_error(trimmed_mean(gram, F) @ rows, expected) < 1e-9


def test_steps_of_weiszfeld_and_of_clipping_are_byzfls(byzfl):
    """ByzFL starts both from zero, which is no mean of the changes."""
    gram, rows = of_equal_ranks(3.0)
    median = clipped = torch.zeros(N, dtype=torch.float64)
    radius = 0.7 * float(rows.norm(dim=1).median())
    for _ in range(3):
        median = _weiszfeld_step(_distances_to(gram, median), 0.1)
        clipped = _clipping_step(clipped, _distances_to(gram, clipped), radius)
    expected = torch.from_numpy(byzfl.GeometricMedian(nu=0.1, T=3)(rows.numpy()))
    assert reference.relative_error(median @ rows, expected) < 1e-12
    expected = torch.from_numpy(byzfl.CenteredClipping(L=3, tau=radius)(rows.numpy()))
    assert reference.relative_error(clipped @ rows, expected) < 1e-12
