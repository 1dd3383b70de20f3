"""Epsilon of telling two fitted Gaussians apart: an estimate of what canaries leak, no bound.

    in: N(mean_1, deviation_1^2),  out: N(mean_0, deviation_0^2)   fitted to the canaries' scores
    delta(epsilon) = max over both orders of  sup_S  P(S) - e^epsilon Q(S)

(Andrew et al. 2023, arXiv 2302.03098, section 3; there the scores of absent canaries are known in
closed form, here they are those of the canaries that are out.) It extrapolates from some hundred
scores to events of probability delta, so it may be above the true epsilon or below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["delta_of_gaussians", "epsilon_of_gaussians", "fitted_epsilon"]

FEWEST_SCORES = 8  # on either side: fewer determine no deviation
LARGEST = 1e4  # an epsilon beyond it is returned as infinity

Gaussian = tuple[float, float]  # mean, standard deviation


def fitted_epsilon(scores_in: Sequence[float], scores_out: Sequence[float], delta: float) -> float:
    """Epsilon of the Gaussians fitted to both samples; NaN for fewer than ``FEWEST_SCORES``."""
    if min(len(scores_in), len(scores_out)) < FEWEST_SCORES:
        return math.nan
    first, second = _fitted(scores_in), _fitted(scores_out)
    if min(first[1], second[1]) == 0.0:
        return math.inf if first[0] != second[0] else 0.0
    return epsilon_of_gaussians(first, second, delta)


def _fitted(scores: Sequence[float]) -> Gaussian:
    return float(np.mean(scores)), float(np.std(scores, ddof=1))


def epsilon_of_gaussians(first: Gaussian, second: Gaussian, delta: float) -> float:
    """The smallest epsilon at which the two are (epsilon, delta)-indistinguishable."""
    from scipy.optimize import brentq

    def excess(epsilon: float) -> float:
        there = delta_of_gaussians(first, second, epsilon)
        return max(there, delta_of_gaussians(second, first, epsilon)) - delta

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
        if high > LARGEST:
            return math.inf
    return float(brentq(excess, 0.0, high, xtol=1e-9))


def delta_of_gaussians(first: Gaussian, second: Gaussian, epsilon: float) -> float:
    """``P(S) - e^epsilon Q(S)`` on the best ``S``, where ``log p(x) / q(x) > epsilon``.

    The logarithm is ``a x^2 + b x + c``: ``S`` is a half-line for equal deviations, otherwise the
    inside or the outside of an interval.
    """
    (mean_p, dev_p), (mean_q, dev_q) = first, second
    a = 0.5 / dev_q**2 - 0.5 / dev_p**2
    b = mean_p / dev_p**2 - mean_q / dev_q**2
    c = 0.5 * (mean_q / dev_q) ** 2 - 0.5 * (mean_p / dev_p) ** 2 + math.log(dev_q / dev_p)
    c -= epsilon
    intervals = _positive(a, b, c)
    return sum(_gained(interval, first, second, epsilon) for interval in intervals)


def _positive(a: float, b: float, c: float) -> list[tuple[float, float]]:
    """The intervals on which ``a x^2 + b x + c > 0``."""
    if a == 0.0:
        if b == 0.0:
            return [(-math.inf, math.inf)] if c > 0 else []
        return [(-c / b, math.inf)] if b > 0 else [(-math.inf, -c / b)]
    square = b * b - 4 * a * c
    if square <= 0:
        return [(-math.inf, math.inf)] if a > 0 else []
    # The root that adds two numbers of one sign, and the other from the product of the roots.
    q = -0.5 * (b + math.copysign(math.sqrt(square), b))
    low, high = sorted((q / a, c / q))
    return [(-math.inf, low), (high, math.inf)] if a > 0 else [(low, high)]


def _gained(
    interval: tuple[float, float], first: Gaussian, second: Gaussian, epsilon: float
) -> float:
    # e^epsilon may overflow where the probability beside it is as small.
    return math.exp(_log_mass(interval, first)) - math.exp(epsilon + _log_mass(interval, second))


def _log_mass(interval: tuple[float, float], gaussian: Gaussian) -> float:
    """The logarithm of the probability of an interval, from the nearer tail."""
    from scipy.special import log_ndtr

    mean, deviation = gaussian
    low, high = ((end - mean) / deviation for end in interval)
    if low > 0:
        low, high = -high, -low
    upper, lower = float(log_ndtr(high)), float(log_ndtr(low))
    return upper + math.log1p(-math.exp(lower - upper)) if upper > lower else -math.inf
