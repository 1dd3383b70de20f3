"""The observers of one run: the caller's, ``live.json``, and those that are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexlora.config.resolve import Config
from flexlora.errors import one_line
from flexlora.runs.live_state import FAILED, FINISHED, INTERRUPTED
from flexlora.server.observing.live import LiveObserver
from flexlora.server.observing.members import MembersObserver
from flexlora.server.observing.observer import Observer, Observers
from flexlora.server.observing.prometheus import metrics_endpoint
from flexlora.server.observing.trackers import trackers

__all__ = ["observed"]


@contextmanager
def observed(
    folder: Path,
    config: Config,
    caller: Observer | None = None,
    *,
    resumed: bool = False,
    deployed: bool = False,
) -> Iterator[Observer]:
    """The observer of one run into ``folder``; its thread and its port are closed at the end.

    A ``deployed`` run has nodes whose last replies an operator wants to see (``members.json``).

    Raises:
        UserError: the endpoint cannot listen where ``server.metrics-host`` and ``-port`` say.
    """
    with metrics_endpoint(config) as endpoint, trackers(config, folder) as reported:
        live = LiveObserver(folder, opened=resumed)
        try:
            members = [MembersObserver(folder, resumed=resumed)] if deployed else []
            yield Observers([live, *members, *endpoint, *reported], caller)
        except KeyboardInterrupt:
            live.close(INTERRUPTED)
            raise
        except BaseException as error:
            live.close(FAILED, one_line(error).rstrip(": "))
            raise
        live.close(FINISHED)
