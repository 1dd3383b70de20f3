"""What the canaries of a run say about its epsilon, for all of them and by rank class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.privacy.canary_scores import in_statistic, linear_statistic
from flexlora.privacy.gaussian_fit import fitted_epsilon
from flexlora.privacy.membership import auc
from flexlora.privacy.one_run import LowerBound, epsilon_at_least

__all__ = ["ALL", "CanaryFigures", "audit_canaries"]

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class CanaryFigures:
    """Of the canaries of one rank class, or of all.

    ``lower`` holds with 95 % confidence for each class by itself; ``estimate`` is NaN for too few
    canaries, ``auc`` where all coins fell alike.
    """

    name: str
    canaries: int
    included: int
    auc: float
    lower: LowerBound
    estimate: float


def audit_canaries(
    scores: Sequence[Sequence[float]],
    weights: Sequence[float],
    share: float,
    *,
    included: Sequence[bool],
    classes: Sequence[str],
    delta: float,
) -> list[CanaryFigures]:
    """Figures of all canaries, then of each rank class where there are several.

    ``scores`` are ``[rounds, m]``, ``weights [rounds]``; ``included`` and ``classes`` have one
    entry per canary.
    """
    statistic = in_statistic(scores, weights, share)
    linear = linear_statistic(scores, weights)
    groups: dict[str, list[int]] = {ALL: list(range(len(included)))}
    names = sorted(set(classes), key=lambda name: (len(name), name))  # rank_8 before rank_16
    if len(names) > 1:
        groups |= {n: [k for k, held in enumerate(classes) if held == n] for n in names}
    found = []
    for name, members in groups.items():
        coins = [included[k] for k in members]
        inside = [linear[k] for k in members if included[k]]
        outside = [linear[k] for k in members if not included[k]]
        values = [statistic[k] for k in members]
        figures = CanaryFigures(
            name=name,
            canaries=len(members),
            included=len(inside),
            auc=auc(
                [v for v, coin in zip(values, coins, strict=True) if coin],
                [v for v, coin in zip(values, coins, strict=True) if not coin],
            ),
            lower=epsilon_at_least(values, coins, delta),
            estimate=fitted_epsilon(inside, outside, delta),
        )
        found.append(figures)
    return found
