"""The Gaussian-fit estimate of epsilon against the closed form and an integral."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from scipy.stats import norm

from flexlora.privacy.gaussian_fit import (
    delta_of_gaussians,
    epsilon_of_gaussians,
    fitted_epsilon,
)


@pytest.mark.parametrize("distance", [0.1, 1.0, 5.0, 20.0])
def test_equal_deviations_are_the_gaussian_mechanism(distance):
    for one, other in (((distance, 1.0), (0.0, 1.0)), ((0.0, 1.0), (distance, 1.0))):
        expected = get_epsilon_gaussian(1 / distance, 1e-5)
        assert epsilon_of_gaussians(one, other, 1e-5) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(
    ("first", "second"), [((1, 2), (0, 1)), ((0, 1), (1, 2)), ((3, 0.5), (0, 2)), ((0, 2), (0, 1))]
)
def test_unequal_deviations_are_the_integral(first, second, epsilon):
    x = np.linspace(-40, 40, 800_001)
    excess = norm.pdf(x, *first) - math.exp(epsilon) * norm.pdf(x, *second)
    expected = np.maximum(excess, 0).sum() * (x[1] - x[0])
    assert delta_of_gaussians(first, second, epsilon) == pytest.approx(expected, abs=1e-7)


def test_a_fit_of_many_scores_is_the_epsilon_of_their_distributions():
    draw = np.random.default_rng(0)
    found = fitted_epsilon(draw.normal(2, 1, 200_000), draw.normal(0, 1, 200_000), 1e-5)
    assert found == pytest.approx(epsilon_of_gaussians((2, 1), (0, 1), 1e-5), rel=0.03)


def test_few_or_constant_scores():
    assert math.isnan(fitted_epsilon([1.0] * 7, [0.0] * 50, 1e-5))
    assert fitted_epsilon([1.0] * 8, [0.0] * 8, 1e-5) == math.inf
    assert fitted_epsilon([1.0] * 8, [1.0] * 8, 1e-5) == 0.0
