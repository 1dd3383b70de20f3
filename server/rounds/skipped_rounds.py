"""Rounds that were skipped for want of updates do not count: others are held in their place.

Such a round keeps its number, its rows and its checkpoint, and changes nothing. The run ends after
``num-server-rounds`` rounds that did change something, or when ``server.skipped-rounds`` in a row
were skipped; between those it pauses for longer and longer, since what is missing may come back.

In a simulation they count: its failures are a function of the seed, and runs are compared round by
round.
"""

from __future__ import annotations

from collections.abc import Iterable

from flexlora.config.resolve import Config
from flexlora.server.members.waiting import Say
from flexlora.server.transport.clocks import Clock

__all__ = ["SkippedRounds"]

FIRST_PAUSE_SECONDS = 15.0


class SkippedRounds:
    """The numbers of the skipped rounds of a run. With a ``limit`` of 0 they count as others."""

    def __init__(self, limit: int, numbers: Iterable[int] = ()) -> None:
        self.limit, self.numbers = limit, sorted(numbers)

    def add(self, server_round: int) -> None:
        self.numbers.append(server_round)

    def before(self, server_round: int) -> int:
        """How many rounds before ``server_round`` do not count."""
        return sum(number < server_round for number in self.numbers) if self.limit else 0

    def extended(self, num_rounds: int) -> int:
        """The number of the last round, where ``num_rounds`` are to count."""
        return num_rounds + (len(self.numbers) if self.limit else 0)

    def in_a_row(self, server_round: int) -> int:
        """The skipped rounds that end with ``server_round``."""
        count = 0
        while server_round - count in self.numbers:
            count += 1
        return count

    def pause_seconds(self, server_round: int, most: float) -> float:
        """Before the next round: 0 after one that counts, then 15, 30, 60 ... up to ``most``."""
        count = self.in_a_row(server_round) if self.limit else 0
        return min(most, FIRST_PAUSE_SECONDS * 2.0 ** (count - 1)) if count else 0.0

    def pause(self, server_round: int, clock: Clock, config: Config, say: Say) -> None:
        """Give what is missing time to come back after a skipped round."""
        seconds = self.pause_seconds(server_round, config.server.wait_seconds)
        if seconds:
            say("the next round, as this one was skipped", seconds)
        until = clock.now() + seconds
        while clock.now() < until:
            clock.wait_for_nodes(until)

    def verdict(self, server_round: int, num_rounds: int, cause: str) -> str:
        """Why the run ends after ``server_round``; empty where it goes on."""
        if not self.limit or self.in_a_row(server_round) < self.limit:
            return ""
        counted = server_round - len(self.numbers)
        return (
            f"{self.limit} rounds in a row were skipped, the last as {cause.strip()}; "
            f"the run ends after round {server_round}, with {counted} of {num_rounds} rounds that "
            "count. It can be resumed; server.skipped-rounds is how many it bears."
        )
