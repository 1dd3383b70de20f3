"""Time as a round sees it: the wall's, or the simulated time of a grid that has a clock of its own.

Deadlines, waiting for nodes and the seconds of a round are the same code in both.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Clock", "Spent", "WallClock", "clock_of"]


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one client's training took out there."""

    seconds: float
    joules: float


class Clock(Protocol):
    """``simulated`` says whether its seconds are anybody's but ours."""

    simulated: bool
    busy_until: dict[str, float]  # by client that is at work, on a simulated clock

    def now(self) -> float:
        """Seconds since some beginning, never backwards."""

    def wait(self, until: float) -> None:
        """Let some time pass: until the next thing that can happen, at most to ``until``."""

    def wait_for_nodes(self, until: float) -> None:
        """The same, until somebody may have come or gone, whatever replies are on their way."""

    def set(self, seconds: float) -> None:
        """Go on from ``seconds``, where an earlier process of the same run had come to."""

    def spent(self, client_id: str) -> Spent | None:
        """What this client's last training took, if the clock knows."""

    def downloaded(self, client_id: str) -> float:
        """The share of its last message that this client had when it answered or left."""


class WallClock:
    """The machine's own time; waiting is polling."""

    simulated = False

    def __init__(self, poll_seconds: float = 0.1) -> None:
        self.poll_seconds = poll_seconds
        self.busy_until: dict[str, float] = {}

    def now(self) -> float:
        return time.monotonic()

    def wait(self, until: float) -> None:
        time.sleep(max(0.0, min(self.poll_seconds, until - time.monotonic())))

    def wait_for_nodes(self, until: float) -> None:
        self.wait(until)

    def set(self, seconds: float) -> None:
        """The wall's time goes on by itself."""

    def spent(self, client_id: str) -> Spent | None:
        return None

    def downloaded(self, client_id: str) -> float:
        return 1.0


def clock_of(grid: Any) -> Clock:
    """The grid's own clock, or the wall's."""
    return getattr(grid, "clock", None) or WallClock()
