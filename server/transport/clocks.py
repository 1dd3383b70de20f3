"""Time as a round sees it: the wall's, or the simulated time of a grid that has a clock of its own.

Deadlines, waiting for nodes and the seconds of a round are the same code in both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = [
    "Clock",
    "Spent",
    "WallClock",
    "clock_of",
    "clock_state",
    "is_measured",
    "restore_clock",
]

FIRST_PAUSE_SECONDS, PAUSE_GROWTH, LONGEST_PAUSE_SECONDS = 0.1, 1.3, 2.0  # between two polls


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds and joules of one client's training on a simulated clock."""

    seconds: float
    joules: float


class Clock(Protocol):
    """``simulated`` is False for the machine's own time."""

    simulated: bool
    busy_until: dict[str, float]  # by the id of a client that is training, on a simulated clock

    def now(self) -> float:
        """Seconds since an arbitrary origin, never decreasing."""

    def wait(self, until: float) -> None:
        """Let time pass to the next event, at most to ``until``."""

    def hurry(self) -> None:
        """A reply has come: the next may be close behind."""

    def wait_for_nodes(self, until: float) -> None:
        """Let time pass until a node may have come or gone, whatever replies are on their way."""

    def set(self, seconds: float) -> None:
        """Set the time to ``seconds``: that of an earlier process of the same run."""

    def spent(self, client_id: str) -> Spent | None:
        """What this client's last training took, if the clock knows."""

    def downloaded(self, client_id: str) -> float:
        """The share of its last message that this client had when it answered or left."""


class WallClock:
    """The machine's own time. Waiting is polling, at a pace that slows down until a reply comes."""

    simulated = False

    def __init__(self) -> None:
        self.busy_until: dict[str, float] = {}
        self.pause = FIRST_PAUSE_SECONDS

    def now(self) -> float:
        return time.monotonic()

    def wait(self, until: float) -> None:
        time.sleep(max(0.0, min(self.pause, until - time.monotonic())))
        self.pause = min(PAUSE_GROWTH * self.pause, LONGEST_PAUSE_SECONDS)

    def hurry(self) -> None:
        self.pause = FIRST_PAUSE_SECONDS

    def wait_for_nodes(self, until: float) -> None:
        self.wait(until)

    def set(self, seconds: float) -> None:
        """The wall's time cannot be set."""

    def spent(self, client_id: str) -> Spent | None:
        return None

    def downloaded(self, client_id: str) -> float:
        return 1.0


def clock_of(grid: Any) -> Clock:
    """The grid's own clock, or the wall's."""
    return getattr(grid, "clock", None) or WallClock()


def is_measured(grid: Any) -> bool:
    """Whether rounds take the time of real nodes: not in a simulation of ours."""
    return not (clock_of(grid).simulated or getattr(grid, "in_process", False))


def clock_state(clock: Clock) -> dict[str, Any]:
    """What ``restore_clock`` needs to go on from now; empty for the wall's time."""
    if not clock.simulated:
        return {}
    busy = {name: until for name, until in clock.busy_until.items() if until > clock.now()}
    return {"simulated_now": clock.now(), "busy_until": busy}


def restore_clock(state: Mapping[str, Any], clock: Clock) -> None:
    """Set a simulated clock to ``state``, if it holds one."""
    if state.get("simulated_now") is not None:
        clock.set(state["simulated_now"])
        clock.busy_until.clear()
        clock.busy_until.update(state.get("busy_until", {}))
