"""The paired bootstrap over clients: a plain loop, laws, and a control without pairs."""

import numpy as np
import pytest

import evaluation_reference
from flexlora.evaluation.bootstrap import LEVEL, paired_difference
from flexlora.evaluation.metrics import METRICS
from flexlora.wire.jobs import Score

LOSS = METRICS[0]


def score(total, weight):
    return Score(loss=float(total), tokens=int(weight), rows=1)


def two_models(count, *, gain=0.3, seed=0):
    """Clients of very unequal loss and size; the second model is better by ``gain`` on each."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, 200, size=count)
    levels = draw.normal(3.0, 1.0, size=count)
    gains = gain + 0.02 * draw.normal(size=count)
    base = [score(a * n, n) for a, n in zip(levels, tokens, strict=True)]
    tuned = [score((a - g) * n, n) for a, g, n in zip(levels, gains, tokens, strict=True)]
    return tuned, base


def test_the_interval_is_that_of_a_plain_loop():
    tuned, base = two_models(12)
    found = paired_difference(LOSS, tuned, base, seed=0, resamples=4000)
    pairs = [(a.loss, a.tokens, b.loss, b.tokens) for a, b in zip(tuned, base, strict=True)]
    low, high = evaluation_reference.bootstrap_interval(pairs, resamples=4000, level=LEVEL)
    width = high - low
    assert found.clients == 12
    assert found.low == pytest.approx(low, abs=0.1 * width)
    assert found.high == pytest.approx(high, abs=0.1 * width)
    a, w, b, v = (sum(column) for column in zip(*pairs, strict=True))
    assert found.value == pytest.approx(a / w - b / v), "pooled over tokens, as the losses are"
    assert found.low < found.value < found.high


def test_clients_are_drawn_in_pairs():
    """Unequal clients hide a gain that every client has; drawn in pairs it shows."""
    tuned, base = two_models(20)
    paired = paired_difference(LOSS, tuned, base, seed=0)
    shuffled = paired_difference(LOSS, tuned, base[1:] + base[:1], seed=0)
    assert paired.excludes_zero and paired.value == pytest.approx(-0.3, abs=0.05)
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low), "the control"


def test_the_order_of_clients_and_the_seed():
    tuned, base = two_models(9)
    assert paired_difference(LOSS, tuned, base, seed=0) == paired_difference(
        LOSS, tuned, base, seed=0
    )
    other = paired_difference(LOSS, tuned, base, seed=1)
    assert other.value == paired_difference(LOSS, tuned, base, seed=0).value
    assert other.low != paired_difference(LOSS, tuned, base, seed=0).low


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """60 federations of 40 clients: 95 % of the intervals hold the true gain, give or take."""
    hits = 0
    for seed in range(60):
        tuned, base = two_models(40, seed=seed)
        found = paired_difference(LOSS, tuned, base, seed=seed, resamples=300)
        hits += found.low <= -0.3 <= found.high
    assert hits >= 50


def test_equal_scores_differ_by_exactly_nothing():
    _, base = two_models(7)
    found = paired_difference(LOSS, base, base, seed=0)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert not found.excludes_zero


def test_clients_without_a_row_do_not_count_and_one_client_has_no_interval():
    tuned, base = two_models(2)
    found = paired_difference(LOSS, [tuned[0], Score()], [base[0], base[1]], seed=0)
    assert (found.clients, found.low, found.high) == (1, None, None)
    assert not found.excludes_zero
    assert paired_difference(LOSS, [Score()], [Score()], seed=0) is None
