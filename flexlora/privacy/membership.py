"""How well a score separates members from non-members: ROC area and true positives at few false.

Carlini et al. 2022 (arXiv 2112.03570): an attack that is right about few rows and sure of them is a
leak that the area under the curve hides, so the rate of true positives at 1 % false ones is beside
it. Confidence intervals are at 95 %: DeLong's (1988) for the area; Clopper and Pearson's for the
rate, at the threshold that the non-members give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["FALSE_POSITIVES", "Separation", "auc", "separation"]

FALSE_POSITIVES = 0.01
CONFIDENCE = 0.95

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Separation:
    """``tpr`` is the share of members above the threshold that 1 % of the non-members exceed."""

    members: int
    others: int
    auc: float
    auc_interval: Interval
    tpr: float
    tpr_interval: Interval


def separation(members: Sequence[float], others: Sequence[float]) -> Separation:
    """Of scores that are higher for members, with equal scores counted half.

    Raises:
        ValueError: no score on one of the sides.
    """
    if not len(members) or not len(others):
        raise ValueError(f"{len(members)} members and {len(others)} others, expected some of both.")
    area, deviation = _delong(np.asarray(members, float), np.asarray(others, float))
    reach = 1.959964 * deviation
    allowed = math.floor(FALSE_POSITIVES * len(others) + 1e-9)
    # The largest score of a non-member that must not count as a member.
    threshold = np.sort(np.asarray(others, float))[::-1][allowed]
    found = int((np.asarray(members, float) > threshold).sum())
    return Separation(
        members=len(members),
        others=len(others),
        auc=area,
        auc_interval=(max(0.0, area - reach), min(1.0, area + reach)),
        tpr=found / len(members),
        tpr_interval=_clopper_pearson(found, len(members)),
    )


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """The chance that a member's score is above another's; NaN where a side is empty."""
    if not len(members) or not len(others):
        return math.nan
    return _delong(np.asarray(members, float), np.asarray(others, float))[0]


def _delong(members: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """The area and its standard error (DeLong, DeLong and Clarke-Pearson 1988), O(n log n)."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, side="left")
    upto = np.searchsorted(ordered, members, side="right")
    of_members = (below + upto) / 2 / len(others)
    ordered = np.sort(members)
    below = np.searchsorted(ordered, others, side="left")
    upto = np.searchsorted(ordered, others, side="right")
    of_others = 1.0 - (below + upto) / 2 / len(members)
    variance = sum(
        float(np.var(part, ddof=1)) / len(part) for part in (of_members, of_others) if len(part) > 1
    )
    return float(of_members.mean()), math.sqrt(variance)


def _clopper_pearson(found: int, count: int) -> Interval:
    from scipy.stats import beta

    tail = (1 - CONFIDENCE) / 2
    low = float(beta.ppf(tail, found, count - found + 1)) if found else 0.0
    high = float(beta.ppf(1 - tail, found + 1, count - found)) if found < count else 1.0
    return low, high
