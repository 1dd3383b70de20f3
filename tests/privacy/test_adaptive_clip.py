"""The clip that follows a quantile: its split of the budget, its count, where it settles."""

from __future__ import annotations

import math
import random

import pytest

from flexlora.privacy.accounting import Mechanism, epsilon_of
from flexlora.privacy.adaptive_clip import AdaptiveClip

SETTINGS = [(0.5, 4.0), (1.0, 34.0), (1.0, 800.0), (3.0, 100.0)]


def adaptive(noise=1.0, expected=100.0, quantile=0.5):
    return AdaptiveClip(quantile=quantile, noise_multiplier=noise, expected_clients=expected)


def epsilon(*multipliers):
    rounds = [
        (Mechanism(num_clients=9, sample_share=1, noise_multiplier=z, sampling="none"), 1)
        for z in multipliers
    ]
    return epsilon_of(rounds, 1e-5)


@pytest.mark.parametrize(("noise", "expected"), SETTINGS)
def test_both_sums_together_spend_what_the_ledger_counts(noise, expected):
    """The count moves by 1/2: its multiplier is twice its deviation, which the control forgets."""
    clip = adaptive(noise, expected)
    both = epsilon(clip.sum_multiplier, 2 * clip.count_deviation)
    assert both == pytest.approx(epsilon(noise), rel=1e-9)
    assert epsilon(clip.sum_multiplier, clip.count_deviation) > both * (1 + 1e-5)
    assert noise < clip.sum_multiplier <= 1.033 * noise


@pytest.mark.parametrize(("noise", "expected"), SETTINGS)
def test_a_client_moves_the_count_by_one_half_whether_it_is_clipped_or_not(noise, expected):
    clip = adaptive(noise, expected)
    without = clip.share(7, 20, seed=3)
    assert clip.share(8, 21, seed=3) - without == pytest.approx(0.5 / expected, rel=1e-9)
    assert clip.share(7, 21, seed=3) - without == pytest.approx(-0.5 / expected, rel=1e-9)


def test_the_deviation_of_the_count_is_the_stated_one():
    """3,000 seeds: the variance is within 5 deviations ``sqrt(2 / n)``, 13 %, and not twice it."""
    clip = adaptive(1.0, 100.0)
    drawn = [(clip.share(30, 100, seed) - 0.3) * 100.0 for seed in range(3000)]
    ratio = sum(x * x for x in drawn) / len(drawn) / clip.count_deviation**2
    bound = 5 * math.sqrt(2 / len(drawn))
    assert abs(ratio - 1) < bound < 0.13
    for wrong in (2.0, 0.5, 4.0):
        assert abs(ratio * wrong - 1) > bound


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_the_clip_settles_at_the_quantile_of_the_norms(quantile):
    """From 30 times too small and too large, of log-normal norms around 1, 400 a round."""
    draw, clip = random.Random(1), adaptive(1.0, 400.0, quantile)
    for begun in (0.03, 30.0):
        norm = begun
        for t in range(120):
            norms = [math.exp(draw.gauss(0.0, 1.0)) for _ in range(400)]
            share = clip.share(sum(n <= norm for n in norms), len(norms), seed=1000 + t)
            norm = clip.next_clip(norm, share)
        below = 0.5 * (1 + math.erf(math.log(norm) / math.sqrt(2)))
        assert below == pytest.approx(quantile, abs=0.06)


def test_an_empty_round_says_nothing_of_the_norms():
    """Nobody came: the share is 1/2 and noise, as of a round of which half was clipped."""
    clip = adaptive(1.0, 400.0)
    assert clip.share(0, 0, seed=5) == clip.share(10, 20, seed=5)
