"""Say who is waited for: at once, and then every few seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flexlora.server.transport.clocks import Clock

__all__ = ["Say", "WaitReport"]

Say = Callable[[str, float], None]  # what is waited for, and the seconds that are left
FIRST_SECONDS, LONGEST_SECONDS = 2.0, 30.0  # between two reports: 2, 4, 8, 16, 30, 30 ...
MOST_NAMED = 5


class WaitReport:
    """Reports one wait until ``deadline``; most waits end before there is anything to say."""

    def __init__(self, say: Say, clock: Clock, deadline: float) -> None:
        self._say, self._clock, self._deadline = say, clock, deadline
        self._pause = FIRST_SECONDS
        self._due = clock.now() + self._pause

    def report(self, what: str, names: Iterable[object] = ()) -> None:
        """For example ``2 nodes that have not answered: 17, 23``."""
        now = self._clock.now()
        if now < self._due:
            return
        self._pause = min(LONGEST_SECONDS, 2 * self._pause)
        self._due = now + self._pause
        listed = list(map(str, names))
        more = f" and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
        text = f"{what}: {', '.join(listed[:MOST_NAMED])}{more}" if listed else what
        self._say(text, max(0.0, self._deadline - now))
