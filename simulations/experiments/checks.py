"""The verdict of an experiment: expected and measured figures, and how far they differ.

is            |seen - expected| <= tolerance
at least      seen >= expected - tolerance
at most       seen <= expected + tolerance
more than     seen > expected - tolerance
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

__all__ = ["Check", "print_verdict"]

SENSES = ("is", "at least", "at most", "more than")


@dataclass(frozen=True, kw_only=True)
class Check:
    """An expected figure and the measured one; fails where either is not finite.

    ``any_scale``: also judged below scale 1; other figures are only printed there.
    """

    claim: str
    expected: float
    seen: float
    tolerance: float = 0.0
    sense: str = "is"
    any_scale: bool = False

    def __post_init__(self) -> None:
        if self.sense not in SENSES:
            raise ValueError(f"sense is '{self.sense}', expected one of {', '.join(SENSES)}.")

    @property
    def short(self) -> float:
        """By how much ``seen`` violates ``expected``; 0 where it does not, inf if not finite."""
        if not math.isfinite(self.seen) or not math.isfinite(self.expected):
            return math.inf
        over = self.seen - self.expected
        if self.sense == "is":
            return abs(over)
        return max(0.0, over if self.sense == "at most" else -over)

    @property
    def holds(self) -> bool:
        if self.sense == "more than":
            return self.seen - self.expected > -self.tolerance and math.isfinite(self.short)
        return self.short <= self.tolerance

    def judged(self, scale: float) -> bool:
        return self.any_scale or scale >= 1.0

    def sentence(self, scale: float = 1.0) -> str:
        """``claim: expected at least 0, seen 0.29: holds.``"""
        word = "" if self.sense == "is" else f"{self.sense} "
        text = f"{self.claim}: expected {word}{_number(self.expected)}, seen {_number(self.seen)}"
        if not self.judged(scale):
            return f"{text} (not judged at scale {scale:g})."
        return f"{text}: {self._word()}."

    def _word(self) -> str:
        allowed = _number(self.tolerance)
        if not math.isfinite(self.short):
            return "DOES NOT HOLD"
        if not self.holds:
            beyond = _number(self.short - self.tolerance)
            return f"DOES NOT HOLD, {beyond} beyond the tolerance of {allowed}"
        return f"holds within the tolerance of {allowed}" if self.short else "holds"


def print_verdict(checks: Sequence[Check], console: Console, *, scale: float) -> int:
    """Print every sentence and a summary; returns 1 if a judged figure does not hold, else 0."""
    console.print("\nVerdict", style="italic")
    for check in checks:
        console.print(f"  {check.sentence(scale)}", soft_wrap=True)
    judged = [check for check in checks if check.judged(scale)]
    failed = [check for check in judged if not check.holds]
    not_judged = len(checks) - len(judged)
    parts = [f"{len(judged) - len(failed)} of {len(judged)} expected figures hold"] * bool(judged)
    parts += [f"{not_judged} expected figures are those of scale 1 and were not judged"] * bool(
        not_judged
    )
    console.print(f"{'; '.join(parts)}.", soft_wrap=True)
    return 1 if failed else 0


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "nothing"
