"""The metrics of a ``Score``: each a ratio of two of its sums, so that scores of clients add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flexlora.wire.jobs import Score

__all__ = ["METRICS", "Metric", "means"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """``total / weight`` of a score; ``title`` is its column, ``key`` its name in JSON and runs."""

    key: str
    title: str
    total: Callable[[Score], float]
    weight: Callable[[Score], float]
    lower_is_better: bool = False

    def of(self, score: Score) -> float | None:
        """The metric's value; None where no row has it."""
        weight = self.weight(score)
        return self.total(score) / weight if weight else None


METRICS: tuple[Metric, ...] = (
    Metric(
        key="loss",
        title="loss",
        total=lambda s: s.loss,
        weight=lambda s: s.tokens,
        lower_is_better=True,
    ),
    Metric(
        key="bits_per_byte",
        title="bits/byte",
        total=lambda s: s.loss / math.log(2),
        weight=lambda s: s.answer_bytes,
        lower_is_better=True,
    ),
    Metric(
        key="exact_match",
        title="exact match",
        total=lambda s: s.exact_match,
        weight=lambda s: s.generated,
    ),
    Metric(key="rouge_l", title="ROUGE-L", total=lambda s: s.rouge_l, weight=lambda s: s.generated),
    Metric(key="acc", title="acc", total=lambda s: s.correct, weight=lambda s: s.choice_rows),
    Metric(
        key="acc_norm",
        title="acc_norm",
        total=lambda s: s.correct_norm,
        weight=lambda s: s.choice_rows,
    ),
    Metric(
        key="pattern", title="pattern", total=lambda s: s.passed, weight=lambda s: s.pattern_rows
    ),
)


def means(score: Score) -> dict[str, float]:
    """Every metric that the score has, by key."""
    found = ((metric.key, metric.of(score)) for metric in METRICS)
    return {key: value for key, value in found if value is not None}
