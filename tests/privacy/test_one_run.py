"""The one-run lower bound on epsilon: its theorem, an oracle, its coverage."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
from scipy.stats import binom

from flexlora.privacy.one_run import epsilon_at_least, guess_counts, p_value, refuted_epsilon
from reference import one_run_p_value

# Of jax_privacy 2.0.0: canaries, guesses, correct, delta, significance; the bound, p at epsilon 1.
ORACLE = [
    ((100, 50, 48, 1e-5, 0.05), 1.9853308520807949, 0.00014913856038771076),
    ((1000, 300, 240, 1e-5, 0.05), 1.1416994045106883, 0.0040990956669590285),
    ((64, 64, 64, 1e-6, 0.05), 3.0380198792585302, 5.407504059465008e-06),
    ((1000, 1000, 560, 0.0, 0.05), 0.13449899057460799, 1.0),
    ((2000, 100, 99, 1e-3, 0.01), 0.0, 0.11618247796553582),
    ((100, 20, 11, 1e-5, 0.05), 0.0, 0.9768746250671467),
]


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize(("guesses", "correct"), [(12, 12), (12, 9), (7, 0), (20, 13)])
def test_the_p_value_is_the_theorems(guesses, correct, epsilon, delta):
    expected = one_run_p_value(20, guesses, correct, epsilon, delta)
    assert p_value(20, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("case", "bound", "p"), ORACLE)
def test_figures_of_jax_privacy(case, bound, p):
    canaries, guesses, correct, delta, significance = case
    found = refuted_epsilon(canaries, guesses, correct, delta, significance)
    assert found == pytest.approx(bound, abs=3e-6)
    assert p_value(canaries, guesses, correct, 1.0, delta) == pytest.approx(p, rel=1e-9)


def test_jax_privacy_itself_where_it_is_installed():
    if importlib.util.find_spec("jax_privacy") is None:
        pytest.skip("jax_privacy is not installed")
    theirs = pytest.importorskip("jax_privacy.auditing")
    draw = np.random.default_rng(0)
    for _ in range(60):
        canaries = int(draw.integers(5, 2000))
        guesses = int(draw.integers(1, canaries + 1))
        correct = int(guesses * draw.uniform(0.4, 1.0))
        delta = float(10 ** draw.uniform(-9, -2))
        found = refuted_epsilon(canaries, guesses, correct, delta, 0.05)
        expected = theirs._epsilon_one_run(0, canaries, guesses, correct, 0.05, delta)
        assert found == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 2.5])
def test_a_bound_above_the_true_epsilon_is_as_rare_as_it_says(epsilon):
    """Randomised response at ``epsilon`` is right with probability e^eps / (1 + e^eps)."""
    canaries = 40
    chances = binom.pmf(np.arange(canaries + 1), canaries, 1 / (1 + math.exp(-epsilon)))
    bounds = [refuted_epsilon(canaries, canaries, v, 0.0, 0.05) for v in range(canaries + 1)]
    wrong = sum(p for p, bound in zip(chances, bounds, strict=True) if bound > epsilon)
    assert wrong <= 0.05
    # Not by always saying zero: half of the true epsilon and less is refuted most of the time.
    assert sum(p for p, b in zip(chances, bounds, strict=True) if b > 0.3 * epsilon) > wrong


def test_the_best_guesses_are_found_and_paid_for():
    coins = [k % 2 == 0 for k in range(200)]
    perfect = epsilon_at_least([float(coin) for coin in coins], coins, 1e-5)
    assert (perfect.guesses, perfect.correct) == (200, 200)
    tried = len(list(guess_counts(200)))
    paid = refuted_epsilon(200, 200, 200, 1e-5, 0.05 / tried)
    assert perfect.epsilon == pytest.approx(paid, rel=1e-6)
    assert perfect.epsilon < refuted_epsilon(200, 200, 200, 1e-5, 0.05)
    # One canary in ten stands out, and only at the top.
    sharp = [1.0 if coin and k % 20 == 0 else 0.0 for k, coin in enumerate(coins)]
    assert epsilon_at_least(sharp, coins, 1e-5).guesses < 200


def test_scores_that_know_nothing_refute_nothing():
    draw = np.random.default_rng(1)
    coins = draw.random(300) < 0.5
    bounds = [epsilon_at_least(draw.normal(size=300), coins, 1e-5).epsilon for _ in range(5)]
    assert max(bounds) == 0.0


def test_too_few_canaries_make_no_guess():
    assert list(guess_counts(9)) == []
    assert epsilon_at_least([1.0, 0.0], [True, False], 1e-5).epsilon == 0.0


@pytest.mark.parametrize("numbers", [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_impossible_counts_are_refused(numbers):
    with pytest.raises(ValueError, match="expected 0 <= correct <= guesses <= canaries"):
        p_value(*numbers, 1.0, 1e-5)
