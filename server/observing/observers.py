"""Who watches a run: the caller's own observer, ``live.json``, and the endpoint where asked for.

What is only watching must not end a run: an observer of ours that raises is logged once, and the
others are told all the same. The caller's own observer is the caller's: what it raises, passes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from flexlora.config.resolve import Config
from flexlora.errors import one_line
from flexlora.runs.live_state import FAILED, FINISHED, INTERRUPTED
from flexlora.server.members.roster import Roster
from flexlora.server.observing.live import LiveObserver
from flexlora.server.observing.observer import Observer
from flexlora.server.observing.prometheus import metrics_endpoint

__all__ = ["Observers", "observed"]

LOG = logging.getLogger(__name__)


class Observers:
    """Tells every one of ``others``, whatever they raise, and then ``own``.

    Implements ``observer.Observer``; an observer without one of its methods is
    not told of that.
    """

    def __init__(self, others: Sequence[object], *, own: Observer | None = None) -> None:
        self.others, self.own = tuple(others), own
        self._logged: set[int] = set()

    def met(self, roster: Roster) -> None:
        self._tell("met", roster)

    def round_started(self, server_round: int, num_rounds: int, num_clients: int) -> None:
        self._tell("round_started", server_round, num_rounds, num_clients)

    def replied(self, client_id: str, cause: str) -> None:
        self._tell("replied", client_id, cause)

    def resent(self, client_id: str, attempt: int, cause: str) -> None:
        self._tell("resent", client_id, attempt, cause)

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        self._tell("round_finished", metrics)

    def _tell(self, event: str, *args: object) -> None:
        for place, observer in enumerate(self.others):
            try:
                _call(observer, event, *args)
            except Exception as error:
                if place not in self._logged:
                    name = type(observer).__name__
                    LOG.warning("%s fails, and the run goes on: %s", name, one_line(error))
                self._logged.add(place)
        if self.own is not None:
            _call(self.own, event, *args)


def _call(observer: object, event: str, *args: object) -> None:
    handler = getattr(observer, event, None)
    if handler is not None:
        handler(*args)


@contextmanager
def observed(
    folder: Path, config: Config, own: Observer | None = None, *, resumed: bool = False
) -> Iterator[Observer]:
    """The observer of one run into ``folder``; what it keeps open is closed when the run ends.

    Raises:
        UserError: the endpoint cannot listen where ``server.metrics-host`` and ``-port`` say.
    """
    with metrics_endpoint(config) as endpoint:
        live = LiveObserver(folder, opened=resumed)
        try:
            yield Observers([live, *endpoint], own=own)
        except KeyboardInterrupt:
            live.close(INTERRUPTED)
            raise
        except BaseException as error:
            live.close(FAILED, one_line(error).rstrip(": "))
            raise
        live.close(FINISHED)
