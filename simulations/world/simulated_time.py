"""Simulated time: when replies arrive, who can be reached, what a training costs its client.

The world is the clock of the simulation's grid. Its seconds pass only while the server waits, from
one event to the next, so that a round of hours takes as long as its arithmetic. The server's
deadlines, quorums and over-selection are the code of a deployment.

A client that leaves in the middle, by chance or because its time online is over, sends nothing; the
server learns of it ``LOST_AFTER`` seconds later, as from Flower, which gives up a silent node
after 50 to 60 s. Without simulated devices a training takes ``NOMINAL_SECONDS``.

A client does one thing at a time: a message that reaches it while it is busy is worked on when its
earlier work has ended, whether or not the server still waits for that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexlora.config.resolve import Config
from flexlora.server.transport.clocks import Spent
from flexlora.simulations.world.clock import Clock, Effort, Price
from flexlora.simulations.world.populations import Population

__all__ = ["World", "world_of"]

LOST_AFTER = 60.0
NOMINAL_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class _Trip:
    arrives: float
    left_after: float | None


def world_of(config: Config, population: Population) -> World | None:
    """The world that the ``population.*`` keys describe; None where no key makes time matter."""
    chance = population.dropout or population.straggler_share
    if not (population.has_hardware or chance or config.population.availability != "always"):
        return None
    return World(population, Clock.from_config(config, population))


class World:
    """Implements ``flexlora.server.transport.clocks.Clock`` with seconds that pass by events."""

    simulated = True

    def __init__(self, population: Population, clock: Clock | None) -> None:
        self.population, self.clock = population, clock
        self._now = 0.0
        self._trips: dict[str, _Trip] = {}
        self._spent: dict[str, Spent] = {}
        self._downloaded: dict[str, float] = {}
        self.busy_until: dict[str, float] = {}

    def now(self) -> float:
        return self._now

    def set(self, seconds: float) -> None:
        self._now = seconds

    def spent(self, client_id: str) -> Spent | None:
        return self._spent.get(client_id)

    def downloaded(self, client_id: str) -> float:
        """The share of its last message that the client had when it answered or left."""
        return self._downloaded.get(client_id, 1.0)

    def wait(self, until: float) -> None:
        """On to the next arrival, or where none is due to the next change of who is online."""
        arrival = self._next_arrival()
        self._advance(self._next_change() if arrival == math.inf else arrival, until)

    def hurry(self) -> None:
        """Waiting ends with an event, whatever came before."""

    def wait_for_nodes(self, until: float) -> None:
        """On to the next change of who is online, or to an arrival that comes before it."""
        self._advance(min(self._next_arrival(), self._next_change()), until)

    def _next_arrival(self) -> float:
        coming = (trip.arrives for trip in self._trips.values())
        return min((arrives for arrives in coming if arrives > self._now), default=math.inf)

    def _next_change(self) -> float:
        changes = self.population.availability.changes_at
        return min(
            (changes(client_id, self._now) for client_id in self.population.clients),
            default=math.inf,
        )

    def _advance(self, upcoming: float, until: float) -> None:
        # A change so near that the sum rounds to now is stepped over.
        self._now = max(min(upcoming, until), math.nextafter(self._now, math.inf))

    def online(self, client_id: str) -> bool:
        return self.population.availability.online(client_id, self._now)

    def send(self, message_id: str, effort: Effort) -> bool:
        """A train message goes out now; False where its client will not answer it."""
        client_id = effort.client_id
        begins = max(self._now, self.busy_until.get(client_id, self._now))
        offline = self.population.availability.changes_at(client_id, self._now)
        price = self._price(effort)
        leaves = math.inf if price.leaves_after is None else price.leaves_after
        left = min(max(0.0, offline - begins), leaves)
        took = min(left, price.seconds)
        self._spent[client_id] = Spent(seconds=took, joules=price.joules_until(took))
        self._downloaded[client_id] = price.downloaded_until(took)
        self.busy_until[client_id] = begins + took
        if left < price.seconds:
            arrives = begins + left + LOST_AFTER
            self._trips[message_id] = _Trip(arrives=arrives, left_after=left)
            return False
        self._trips[message_id] = _Trip(arrives=begins + price.seconds, left_after=None)
        return True

    def _price(self, effort: Effort) -> Price:
        population, client_id = self.population, effort.client_id
        if self.clock is None:
            seconds = NOMINAL_SECONDS * population.slowdown(client_id, effort.server_round)
            part = population.leaves_at(client_id, effort.server_round)
            return Price(
                download_seconds=0.0,
                train_seconds=seconds,
                upload_seconds=0.0,
                leaves_after=None if part is None else part * seconds,
            )
        return self.clock.price(effort)

    def arrived(self, message_id: str) -> bool:
        """Whether there is an answer by now; messages that were never sent have theirs at once."""
        trip = self._trips.get(message_id)
        return trip is None or trip.arrives <= self._now

    def arrives(self, message_id: str) -> float:
        """When the answer to a message that is on its way comes."""
        return self._trips[message_id].arrives

    def take(self, message_id: str) -> str:
        """Close the trip of an arrived message; why there is no answer, or nothing."""
        trip = self._trips.pop(message_id, None)
        if trip is None or trip.left_after is None:
            return ""
        return f"the client left after {trip.left_after:.0f} s"

    def forget(self, message_id: str) -> None:
        """Drop the answer to a message; its client stays busy with it all the same."""
        self._trips.pop(message_id, None)
