"""Keeps ``RUN/live.json`` up to date, a few times a second at most, in a thread of its own.

The run itself never waits for the disk: events change a value in memory, the thread writes it. It
writes every few seconds when nothing happens too, so that silence means that the process is gone.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from flexlora.runs.live_state import (
    EVALUATING,
    HEARTBEAT_SECONDS,
    MEETING,
    TRAINING,
    WAITING,
    Failure,
    LiveState,
    process_space,
    write_live,
)
from flexlora.server.members.roster import Roster
from flexlora.server.observing.causes import EVALUATION, SKIPPED, failure_kind, of_another_round

__all__ = ["LiveObserver"]

LOG = logging.getLogger(__name__)
SHORTEST_SECONDS = 0.25  # between two writes
MOST_CLIENTS = 40
MOST_FAILURES = 20
MOST_LETTERS = 300


class LiveObserver:
    """Implements ``flexlora.server.observing.observer.Observer``.

    Nothing is written before the folder is this run's: from the start (``opened``, of a resume),
    or from the first round on.
    """

    def __init__(
        self, folder: Path, *, opened: bool = False, heartbeat: float = HEARTBEAT_SECONDS
    ) -> None:
        self.folder, self.heartbeat = folder, heartbeat
        now = time.time()
        self._state = LiveState(
            state=MEETING, started=now, round_started=now, pid=os.getpid(), host=process_space()
        )
        self._lock = threading.Lock()
        self._changed, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._told_of_disk = False
        if opened:
            self._open()

    def met(self, roster: Roster) -> None:
        classes = Counter(member.rank_class.name for member in roster.members.values())
        ordered = {name: classes[name] for name in roster.rank_classes}
        self._change(classes=ordered, left_out=len(roster.left_out))

    def round_started(self, server_round: int, num_rounds: int, num_clients: int) -> None:
        self._change(
            state=TRAINING if server_round else EVALUATING,
            round=server_round,
            num_rounds=num_rounds,
            asked=num_clients,
            heard=0,
            failed=0,
            resent=0,
            replied=(),
            failures=(),
            round_started=time.time(),
        )
        self._open()

    def replied(self, client_id: str, cause: str) -> None:
        """Counts a client as heard of once: replies to evaluation and late ones come on top."""
        now, kind = self._state, failure_kind(cause)
        if kind == SKIPPED:
            self._change(cause=cause[:MOST_LETTERS])
            return
        more: dict[str, object] = {}
        if not of_another_round(cause) and (kind != EVALUATION or now.round == 0):
            more["heard"] = now.heard + 1
            if now.heard + 1 >= now.asked:
                more["state"] = EVALUATING
        if kind:
            failure = Failure(client_id=client_id, cause=cause[:MOST_LETTERS])
            more |= {
                "failed": now.failed + 1,
                "failures": (*now.failures, failure)[-MOST_FAILURES:],
            }
        else:
            more["replied"] = (*now.replied, client_id)[-MOST_CLIENTS:]
        self._change(**more)

    def resent(self, client_id: str, attempt: int, cause: str) -> None:
        self._change(resent=self._state.resent + 1)

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        self._change(state=WAITING, cause="")

    def close(self, state: str, cause: str = "") -> None:
        """The run's last word; the thread is gone afterwards."""
        self._closed.set()
        self._changed.set()
        if self._thread is not None:
            self._thread.join()
            self._change(state=state, cause=cause[:MOST_LETTERS])
            self._write()

    def _change(self, **values: object) -> None:
        with self._lock:
            self._state = replace(self._state, **values)  # type: ignore[arg-type]
        self._changed.set()

    def _open(self) -> None:
        if self._thread is None and not self._closed.is_set():
            self._thread = threading.Thread(
                target=self._keep_writing, name="flexlora-live", daemon=True
            )
            self._thread.start()

    def _keep_writing(self) -> None:
        while not self._closed.is_set():
            self._changed.clear()
            self._write()
            self._closed.wait(SHORTEST_SECONDS)
            self._changed.wait(self.heartbeat)

    def _write(self) -> None:
        with self._lock:
            state = replace(self._state, updated=time.time())
        try:
            write_live(self.folder, state)
        except OSError as error:
            if not self._told_of_disk:
                LOG.warning("%s is not written: %s", self.folder / "live.json", error)
            self._told_of_disk = True
