"""``report-to``: the numbers of every round to trackers, from a thread of each.

A tracker may wait for a network. The run never waits for a tracker: a round is put into a queue,
and what cannot be delivered stays there, in order, and is tried again with the next round. At the
end of the run the rest has ``CLOSE_SECONDS``. ``metrics.jsonl`` has every number all the same.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

from flexlora.config.resolve import Config
from flexlora.config.sections import tracker_names
from flexlora.errors import one_line
from flexlora.runs.folder import TRACKERS_FILE
from flexlora.runs.live_state import FAILED, FINISHED, INTERRUPTED
from flexlora.server.observing.observer import Observer
from flexlora.server.observing.tracker_kinds import TRACKERS, Tracker
from flexlora.wire.files import write_atomically

__all__ = ["TrackerObserver", "round_numbers", "trackers"]

LOG = logging.getLogger(__name__)
CLOSE_SECONDS = 60.0
_FILE_LOCK = threading.Lock()  # of trackers.json, which the threads of one run share


def round_numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """The finite numbers of a round's line, per rank class too; modules stay in the folder."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


class TrackerObserver(Observer):
    """Delivers to one tracker, which is opened with the first round: the run's folder is there."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.name, self.folder, self.config = name, folder, dict(config)
        self._queue: Queue[Mapping[str, float] | None] = Queue()
        self._undelivered: deque[Mapping[str, float]] = deque()
        self._tracker: Tracker | None = None
        self._thread: threading.Thread | None = None
        self._warned, self._state = False, FAILED

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        if self._thread is None:
            name = f"flexlora-{self.name}"
            self._thread = threading.Thread(target=self._deliver, name=name, daemon=True)
            self._thread.start()
        self._queue.put(round_numbers(metrics))

    def close(self, state: str, seconds: float = CLOSE_SECONDS) -> None:
        """Deliver what is left, for at most so many seconds, and end the tracker's run."""
        if self._thread is None:
            return
        self._state = state
        self._queue.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"it has not answered for {seconds:.0f} s at the end of the run")

    def _deliver(self) -> None:
        """The thread: every round as it comes, and with it what an earlier try has left."""
        open_ended = True
        while open_ended:
            numbers = self._queue.get()
            if numbers is None:
                open_ended = False
            else:
                self._undelivered.append(numbers)
            try:
                self._empty()
                if not open_ended and self._tracker is not None:
                    self._tracker.close(self._state)
            except BaseException as error:  # a tracker may even end the process
                self._warn(one_line(error))

    def _empty(self) -> None:
        while self._undelivered:
            numbers = self._undelivered[0]
            if self._tracker is None:
                self._tracker = self._opened(int(numbers["round"]))
            self._tracker.log(int(numbers["round"]), numbers)
            self._undelivered.popleft()

    def _opened(self, first_round: int) -> Tracker:
        notes = _read_notes(self.folder).get(self.name, {})
        tracker = TRACKERS[self.name](self.folder, self.config, notes, first_round)
        if tracker.notes and tracker.notes != notes:
            with _FILE_LOCK:
                whole = _read_notes(self.folder) | {self.name: tracker.notes}
                data = (json.dumps(whole, indent=1, sort_keys=True) + "\n").encode()
                write_atomically(self.folder / TRACKERS_FILE, data)
        return tracker

    def _warn(self, cause: str) -> None:
        if not self._warned:
            LOG.warning(
                "report-to: %s fails, and the run goes on (metrics.jsonl has every number): %s",
                self.name,
                cause,
            )
        self._warned = True


def _read_notes(folder: Path) -> dict[str, dict[str, str]]:
    try:
        found = json.loads((folder / TRACKERS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def trackers(config: Config, folder: Path) -> Iterator[list[TrackerObserver]]:
    """An observer for every tracker that ``report-to`` names; they end with the run."""
    flat = {key: value for key, value in config.flat().items() if key != "out"}
    observers = [TrackerObserver(name, folder, flat) for name in tracker_names(config.report_to)]
    state = FAILED
    try:
        yield observers
        state = FINISHED
    except KeyboardInterrupt:
        state = INTERRUPTED
        raise
    finally:
        began = time.monotonic()
        for observer in observers:
            observer.close(state, max(1.0, CLOSE_SECONDS - (time.monotonic() - began)))
