"""Axes of a chart: the span, the ticks, and the position of a value on the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Scale", "Span", "span_of", "ticks", "united"]

Span = tuple[float, float]
LEVEL = 2e-4  # relative: a finer axis would need more digits than its ticks show


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The linear map of ``span`` onto the pixels from ``start`` to ``end``."""

    span: Span
    start: float
    end: float

    def __call__(self, value: float) -> float:
        low, high = self.span
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def span_of(values: Iterable[float], *, from_zero: bool = False) -> Span:
    """A nonempty span of all values.

    It includes 0 if 0 is near, so that small differences do not look large, but not far from 0,
    where differences would disappear. Values that are equal up to rounding get a span from 0.
    """
    numbers = list(values)
    low, high = min(numbers), max(numbers)
    level = high - low <= LEVEL * max(abs(low), abs(high))
    if from_zero or level or 0 <= low <= 0.6 * high:
        low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if high > low else (0.0, 1.0)


def ticks(span: Span, count: int = 5, *, whole: bool = False) -> list[float]:
    """About ``count`` round values from below ``span`` to above it (``whole``: within it)."""
    low, high = span
    step = _round_step((high - low) / max(count - 1, 1))
    if whole:
        step = max(1.0, math.ceil(step))
        first = math.ceil(low / step)
        return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # 12 digits drop the last bits of the product: 0.30000000000000004 is 0.3.
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 and 10 times a power of ten of at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))


def united(spans: Sequence[Span]) -> Span:
    """The smallest span that contains all ``spans``."""
    return min(low for low, _ in spans), max(high for _, high in spans)
