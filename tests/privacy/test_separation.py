"""ROC area and true positives of membership scores, with their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flexlora.privacy.membership import auc, separation
from reference import roc_area


def test_the_area_is_the_share_of_pairs():
    draw = np.random.default_rng(0)
    members, others = draw.integers(0, 9, 40).tolist(), draw.integers(0, 8, 31).tolist()
    assert auc(members, others) == pytest.approx(roc_area(members, others), rel=1e-12)
    assert math.isnan(auc([], others))


def test_true_positives_at_one_per_cent():
    others = [float(k) for k in range(200)]  # two of them may count as members
    found = separation([197.0, 197.5, 198.0, 500.0, -1.0], others)
    assert found.tpr == 3 / 5 and found.tpr_interval[0] < 0.6 < found.tpr_interval[1]


def test_no_false_positive_is_allowed_of_few():
    assert separation([1.0, 3.0], [0.0, 2.0]).tpr == 0.5


def test_intervals_hold_as_often_as_they_say():
    """The true area of N(1, 1) against N(0, 1) is Phi(1 / sqrt 2) = 0.7602."""
    draw, inside = np.random.default_rng(0), 0
    for _ in range(400):
        found = separation(draw.normal(1, 1, 80), draw.normal(0, 1, 60))
        inside += found.auc_interval[0] <= 0.7602 <= found.auc_interval[1]
    assert 0.92 <= inside / 400 <= 0.98


def test_one_side_alone_is_refused():
    with pytest.raises(ValueError, match="0 members and 2 others"):
        separation([], [1.0, 2.0])
