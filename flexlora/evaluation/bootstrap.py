"""A difference of two adapters' scores with an interval: the paired bootstrap over clients.

Clients are drawn with replacement; each draw recomputes both ratios on the same clients,

    d* = sum_k n_k a_k / sum_k n_k w_k - sum_k n_k b_k / sum_k n_k v_k,    n ~ Multinomial(N, 1/N)

with ``a_k / w_k`` and ``b_k / v_k`` the two adapters' scores on client k. The interval holds the
middle 95 % of the d* (the percentile method, Efron and Tibshirani 1993, chapter 13). It speaks of
other clients like these: with fewer than about ten it is too short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexlora.evaluation.metrics import Metric
from flexlora.seeds import numpy_generator
from flexlora.wire.jobs import Score

__all__ = ["LEVEL", "RESAMPLES", "Difference", "paired_difference", "paired_ratios"]

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 2**22  # numbers drawn at once


@dataclass(frozen=True, kw_only=True)
class Difference:
    """``value`` over all clients and the interval; None for an interval of fewer than two."""

    value: float
    low: float | None
    high: float | None
    clients: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def paired_difference(
    metric: Metric,
    scores: Sequence[Score],
    against: Sequence[Score],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> Difference | None:
    """The metric of ``scores`` minus that of ``against``, one score of each per client.

    Clients without a row for the metric do not count; None where none is left.
    """
    pairs = [
        (metric.total(a), metric.weight(a), metric.total(b), metric.weight(b))
        for a, b in zip(scores, against, strict=True)
        if metric.weight(a) and metric.weight(b)
    ]
    if not pairs:
        return None
    return paired_ratios(np.array(pairs, dtype=np.float64), seed=seed, resamples=resamples)


def paired_ratios(
    sums: np.ndarray, *, seed: int, resamples: int = RESAMPLES, constant: float = 1.0
) -> Difference:
    """``constant`` times the difference of two ratios; ``sums [N, 4]`` are totals and weights."""
    sums = sums * np.array([constant, 1.0, constant, 1.0])
    value = float(_differences(sums.sum(axis=0)[None])[0])
    if len(sums) < 2:
        return Difference(value=value, low=None, high=None, clients=len(sums))
    generator = numpy_generator(seed, "bootstrap", len(sums))
    even = np.full(len(sums), 1 / len(sums))
    share = max(1, _CHUNK // len(sums))
    drawn = np.concatenate(
        [
            _differences(generator.multinomial(len(sums), even, size=size) @ sums)
            for at in range(0, resamples, share)
            if (size := min(share, resamples - at))
        ]
    )
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(value=value, low=float(low), high=float(high), clients=len(sums))


def _differences(sums: np.ndarray) -> np.ndarray:
    """``[n, 4]`` totals and weights of both adapters to ``[n]``."""
    return sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
