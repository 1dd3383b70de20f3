"""When a simulated client can be reached: a function of time, queried at any time, in any order.

    always    at every time
    diurnal   with probability p(t) = s (1 + a cos(2 pi (h - 2) / 24)) at its local hour h
    markov    on and off by a two-state Markov chain in continuous time, stationary share s
    trace     as a file of intervals says, over and over

``s`` is ``population.online-share``. The diurnal swing ``a`` is 0.6, so that four times as many
clients are there at 2 at night, idle and charging, as at 2 in the afternoon (Bonawitz et al., MLSys
2019, section 9), and less where s(1 + a) would be more than 1. A client has one time zone of 24 and
draws one number u a day: it is online while p(t) > u, once a day around its peak, all day or not at
all. Over days that has probability p(t) at every t, and mean s over a day.

Seconds count from midnight UTC. Every client has its own stream of random numbers, so that it
has the same times whichever other clients are queried.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from flexlora.config.resolve import KEYS, Config
from flexlora.errors import UserError
from flexlora.seeds import numpy_generator
from flexlora.simulations.world.traces import Trace, read_trace, state_at

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Always", "Availability", "Diurnal", "Markov", "availability_of"]

DAY = 86_400.0
PEAK_HOUR = 2
SWING = 0.6


class Availability(Protocol):
    """``online`` holds from the time itself; ``changes_at`` is the next time it is another."""

    def online(self, client_id: str, seconds: float) -> bool: ...

    def changes_at(self, client_id: str, seconds: float) -> float:
        """The first time after ``seconds`` at which the state differs; infinity if none."""
        ...


def availability_of(config: Config, client_ids: Sequence[str]) -> Availability:
    """What ``population.availability`` and its keys say for these clients.

    Raises:
        UserError: a key that this kind does not read, a trace that is absent or does not fit.
    """
    kind, seed = config.population.availability, config.seed
    share, hours = config.population.online_share, config.population.online_hours
    _refuse_ignored(config, kind)
    if kind == "diurnal":
        return Diurnal(share=share, seed=seed)
    if kind == "markov":
        return Markov(share=share, online_seconds=3600 * hours, seed=seed)
    if kind == "trace":
        return Trace(read_trace(config.population.trace), client_ids)
    return Always()


def _refuse_ignored(config: Config, kind: str) -> None:
    readers = {
        "population.online-share": ("diurnal", "markov"),
        "population.online-hours": ("markov",),
        "population.trace": ("trace",),
    }
    values = config.flat()
    for key, kinds in readers.items():
        if kind not in kinds and values[key] != KEYS[key].default:
            raise UserError(
                f"{key} is {values[key]!r}, which population.availability={kind} does not read; "
                f"set population.availability={' or '.join(kinds)}, or leave the key out."
            )


class Always:
    """Online at every time."""

    def online(self, client_id: str, seconds: float) -> bool:
        return True

    def changes_at(self, client_id: str, seconds: float) -> float:
        return math.inf


class Diurnal:
    """Online once a day around the local peak, for as long as that day's number allows."""

    def __init__(self, *, share: float, seed: int) -> None:
        self.share, self.seed = share, seed
        self.swing = min(SWING, 1 / share - 1)

    def online(self, client_id: str, seconds: float) -> bool:
        start, end = next(self._windows(client_id, seconds))
        return start <= seconds < end

    def changes_at(self, client_id: str, seconds: float) -> float:
        if self.swing == 0:
            return math.inf  # every client is online at every time
        return state_at((w for w in self._windows(client_id, seconds) if w[0] < w[1]), seconds)[1]

    def _windows(self, client_id: str, seconds: float) -> Iterator[tuple[float, float]]:
        """``[start, end)`` online, day by day from the one that ``seconds`` is in; some are empty.

        A client's day is from one trough of p to the next, with the peak in its middle.
        """
        zone = int(numpy_generator(self.seed, "time zone", client_id).integers(24))
        trough = 3600.0 * (PEAK_HOUR + 12 - zone)
        day = int((seconds - trough) // DAY)
        if seconds < trough + day * DAY:
            day -= 1  # the difference was rounded up to a whole day
        while True:
            start = trough + day * DAY
            u = numpy_generator(self.seed, "online", client_id, day).random()
            half = _half_window((u / self.share - 1) / self.swing if self.swing else -1.0)
            yield start + DAY / 2 - half, start + DAY / 2 + half
            day += 1


def _half_window(height: float) -> float:
    """Half of the seconds of a day for which ``cos(2 pi t / DAY) > height``."""
    return DAY / 2 if height <= -1 else DAY * math.acos(min(height, 1.0)) / (2 * math.pi)


class Markov:
    """Exponential times online and offline, with means that leave a client online for ``share``.

    The first state is drawn from the stationary law. A client's changes are made in order, as far
    as the queries reach, and cached: 8 bytes each.
    """

    def __init__(self, *, share: float, online_seconds: float, seed: int) -> None:
        self.share, self.seed = share, seed
        self.means = (online_seconds * (1 / share - 1), online_seconds)  # offline, online
        self._paths: dict[str, _Path] = {}

    def online(self, client_id: str, seconds: float) -> bool:
        path = self._path(client_id)
        return path.starts_online != bool(path.until(seconds) % 2)

    def changes_at(self, client_id: str, seconds: float) -> float:
        if self.share == 1.0:
            return math.inf
        path = self._path(client_id)
        return path.edges[path.until(seconds)]

    def _path(self, client_id: str) -> _Path:
        if client_id not in self._paths:
            generator = numpy_generator(self.seed, "online and offline", client_id)
            self._paths[client_id] = _Path(generator, self.share, self.means)
        return self._paths[client_id]


class _Path:
    """The times at which one client changes, extended when a query goes beyond the last."""

    def __init__(
        self, generator: np.random.Generator, share: float, means: tuple[float, float]
    ) -> None:
        self.generator, self.means = generator, means
        self.starts_online = bool(generator.random() < share)
        self.edges: list[float] = [] if share < 1.0 else [math.inf]

    def until(self, seconds: float) -> int:
        """How many changes there were up to ``seconds``; the next one is known after this."""
        while not self.edges or self.edges[-1] <= seconds:
            online = self.starts_online != bool(len(self.edges) % 2)
            stay = self.generator.exponential(self.means[online])
            self.edges.append((self.edges[-1] if self.edges else 0.0) + stay)
        return bisect_right(self.edges, seconds)
