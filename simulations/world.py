"""Simulated time: when replies arrive, who can be reached, what a training took out there.

The world is the clock of the simulation's grid (``server/clocks.py``). Its seconds pass only while
the server waits, and then from one event to the next, so that a round of hours takes as long as its
arithmetic. The server's deadlines, quorums and over-selection are the code of a deployment.

A client that leaves in the middle, by chance or because its time online is over, sends nothing; the
server learns of it ``LOST_AFTER`` seconds later, as from Flower, which gives up a silent node
after 50 to 60 s. Without simulated devices a training takes ``NOMINAL_SECONDS``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexlora.server.clocks import Spent
from flexlora.simulations.clock import Clock
from flexlora.simulations.populations import Population

from flexlora.config import Config
from flexlora.ranks import RankClass

__all__ = ["Effort", "World", "world_of"]

LOST_AFTER = 60.0
NOMINAL_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a message asks of its client."""

    client_id: str
    server_round: int
    rank_class: RankClass
    quantization: str
    tokens: int
    steps: int
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True, kw_only=True)
class _Trip:
    arrives: float
    left_after: float | None


def world_of(config: Config, population: Population) -> World | None:
    """The world that the ``population.*`` keys describe; None where nobody's time matters."""
    chance = population.dropout or population.straggler_share
    if not (population.has_hardware or chance or config["population.availability"] != "always"):
        return None
    return World(population, Clock.from_config(config, population))


class World:
    """Implements ``flexlora.server.clocks.Clock``."""

    simulated = True

    def __init__(self, population: Population, clock: Clock | None) -> None:
        self.population, self.clock = population, clock
        self._now = 0.0
        self._trips: dict[str, _Trip] = {}
        self._spent: dict[str, Spent] = {}

    def now(self) -> float:
        return self._now

    def set(self, seconds: float) -> None:
        self._now = seconds

    def spent(self, client_id: str) -> Spent | None:
        return self._spent.get(client_id)

    def wait(self, until: float) -> None:
        """On to the next arrival, or where none is due to the next change of who is online."""
        coming = [t.arrives for t in self._trips.values() if t.arrives > self._now]
        if not coming:
            ids, changes = self.population.clients, self.population.availability.changes_at
            coming = [changes(client_id, self._now) for client_id in ids]
        upcoming = min(coming, default=math.inf)
        # A change so near that the sum rounds to now is stepped over.
        self._now = max(min(upcoming, until), math.nextafter(self._now, math.inf))

    def online(self, client_id: str) -> bool:
        return self.population.availability.online(client_id, self._now)

    def send(self, message_id: str, effort: Effort) -> bool:
        """A train message goes out now; False where its client will not answer it."""
        client_id, stays = effort.client_id, math.inf
        stays = self.population.availability.changes_at(client_id, self._now) - self._now
        seconds, leaves, joules = self._price(effort)
        left = min(stays, math.inf if leaves is None else leaves)
        if left < seconds:
            self._spent[client_id] = Spent(seconds=left, joules=joules(left))
            arrives = self._now + left + LOST_AFTER
            self._trips[message_id] = _Trip(arrives=arrives, left_after=left)
            return False
        self._spent[client_id] = Spent(seconds=seconds, joules=joules(seconds))
        self._trips[message_id] = _Trip(arrives=self._now + seconds, left_after=None)
        return True

    def _price(self, effort: Effort) -> tuple:
        """Seconds, when the client leaves (or None), and joules as a function of seconds."""
        population, client_id = self.population, effort.client_id
        if self.clock is None:
            seconds = NOMINAL_SECONDS * population.slowdown(client_id, effort.server_round)
            part = population.leaves_at(client_id, effort.server_round)
            return seconds, None if part is None else part * seconds, lambda _: 0.0
        price = self.clock.price(
            client_id,
            effort.server_round,
            rank_class=effort.rank_class,
            quantization=effort.quantization,
            tokens=effort.tokens,
            steps=effort.steps,
            bytes_down=effort.bytes_down,
            bytes_up=effort.bytes_up,
        )
        return price.seconds, price.leaves_after, price.joules_until

    def arrived(self, message_id: str) -> bool:
        """Whether there is an answer by now; messages that were never sent have theirs at once."""
        trip = self._trips.get(message_id)
        return trip is None or trip.arrives <= self._now

    def take(self, message_id: str) -> str:
        """Close the trip of an arrived message; why there is no answer, or nothing."""
        trip = self._trips.pop(message_id, None)
        if trip is None or trip.left_after is None:
            return ""
        return f"the client left after {trip.left_after:.0f} s"
