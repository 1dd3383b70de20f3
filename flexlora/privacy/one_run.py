"""A lower bound on epsilon from one run in which each canary is in or out by a fair coin.

An auditor scores m canaries by the run's output and guesses the coins of ``r`` of them. If the run
is (epsilon, delta)-differentially private, the number W of right guesses satisfies (Steinke, Nasr
and Jagielski 2023, arXiv 2305.08846, theorem 5.2)

    P[W >= v] <= f(v) + 2 m delta max_{1 <= i <= m} (f(v - i) - f(v)) / i
    f(v) = P[Binomial(r, e^epsilon / (1 + e^epsilon)) >= v]

so an epsilon at which that is below 0.05 is refuted with 95 % confidence. The number of guesses
must not depend on the coins. ``epsilon_at_least`` tries a fixed list of numbers and divides 0.05 by
its length (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["CONFIDENCE", "LowerBound", "epsilon_at_least", "p_value", "refuted_epsilon"]

CONFIDENCE = 0.95
FEWEST_GUESSES = 5  # with fewer, all of them right, no epsilon is refuted


@dataclass(frozen=True, kw_only=True)
class LowerBound:
    """The largest epsilon that is refuted, and by which guesses; 0.0 if none is."""

    epsilon: float
    guesses: int
    correct: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The largest probability of ``correct`` right guesses or more under (epsilon, delta)-DP.

    Raises:
        ValueError: not ``0 <= correct <= guesses <= canaries``, or a negative epsilon or delta.
    """
    from scipy.special import expit
    from scipy.stats import binom

    if not 0 <= correct <= guesses <= canaries or epsilon < 0 or delta < 0:
        raise ValueError(
            f"{correct} of {guesses} guesses on {canaries} canaries at epsilon {epsilon:g}, delta "
            f"{delta:g}; expected 0 <= correct <= guesses <= canaries and no negative numbers."
        )
    right = expit(epsilon)
    base = float(binom.sf(correct - 1, guesses, right))
    # Beyond i = v the numerator stays 1 - f(v) while i grows.
    steps = np.arange(1, correct + 1)
    rises = (binom.sf(correct - steps - 1, guesses, right) - base) / steps
    return min(1.0, base + 2 * canaries * delta * float(rises.max(initial=0.0)))


def refuted_epsilon(
    canaries: int, guesses: int, correct: int, delta: float, significance: float
) -> float:
    """The largest epsilon whose p-value is below ``significance``, to 1e-6; 0.0 if none is."""
    from scipy.optimize import brentq

    def margin(epsilon: float) -> float:
        return significance - p_value(canaries, guesses, correct, epsilon, delta)

    if margin(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while margin(high) > 0:
        low, high = high, 2 * high
    return float(brentq(margin, low, high, xtol=1e-6))


def epsilon_at_least(
    statistic: Sequence[float],
    included: Sequence[bool],
    delta: float,
    confidence: float = CONFIDENCE,
) -> LowerBound:
    """The best bound over ``guess_counts``: the highest ``statistic`` are in, the lowest are out.

    Holds with probability ``confidence`` over the coins and the run, whatever the statistic is, as
    long as it is a function of the run's output alone. Equal values keep the order of the canaries.
    """
    order = np.argsort(-np.asarray(statistic, dtype=float), kind="stable")
    ranked = np.asarray(included, dtype=bool)[order]
    counts = list(guess_counts(len(ranked)))
    best = LowerBound(epsilon=0.0, guesses=0, correct=0)
    for top, bottom in counts:
        correct = int(ranked[:top].sum()) + int((~ranked[len(ranked) - bottom :]).sum())
        significance = (1.0 - confidence) / len(counts)
        guesses = top + bottom
        epsilon = refuted_epsilon(len(ranked), guesses, correct, delta, significance)
        if epsilon > best.epsilon:
            best = LowerBound(epsilon=epsilon, guesses=guesses, correct=correct)
    return best


def guess_counts(canaries: int) -> Iterator[tuple[int, int]]:
    """How many to guess at the top and at the bottom: halves, quarters, eighths, ... of all.

    Each size once at both ends and once at the top alone: a canary that is in and was never sampled
    looks like one that is out, so guesses at the bottom are worth less.
    """
    size = canaries // 2
    while size >= FEWEST_GUESSES:
        yield size, size
        yield size, 0
        size = size // 2
