"""Write ``RUN/live.json`` from a thread of its own, a few times a second at most.

Events change a value in memory and the thread writes it: the run never waits for the disk. It
writes every few seconds without events too: a file that is not renewed means that the run died.
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
from flexlora.runs.outcomes import Outcome
from flexlora.server.members.roster import Roster
from flexlora.server.observing.observer import Observer

__all__ = ["LiveObserver"]

LOG = logging.getLogger(__name__)
SHORTEST_SECONDS = 0.25  # between two writes
MOST_CLIENTS = 40
MOST_FAILURES = 20
MAX_CAUSE_LENGTH = 300


class LiveObserver(Observer):
    """Writes from the start in a resumed run (``opened``), else from the first round on.

    Before that the folder may hold another run.
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
        self._disk_error_logged = False
        if opened:
            self._open()

    def waiting(self, what: str, seconds: float) -> None:
        text = f"waiting for {what}, at most {seconds:.0f} s more"
        self._change(cause=text[:MAX_CAUSE_LENGTH])

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
            cause="",
            round_started=time.time(),
        )
        self._open()

    def replied(self, client_id: str, outcome: Outcome, cause: str, late: bool) -> None:
        if not late:
            self._count_heard()
        if outcome.is_failure:
            self._add_failure(client_id, cause)
        elif outcome is Outcome.OK:
            self._change(replied=(*self._state.replied, client_id)[-MOST_CLIENTS:])

    def evaluated(self, client_id: str, cause: str) -> None:
        """Round 0 asks clients for evaluation only; later ones were counted when they trained."""
        first = self._state.round == 0
        if first:
            self._count_heard()
        if cause:
            self._add_failure(client_id, f"evaluation: {cause}")
        elif first:
            self._change(replied=(*self._state.replied, client_id)[-MOST_CLIENTS:])

    def _count_heard(self) -> None:
        heard = self._state.heard + 1
        state = EVALUATING if heard >= self._state.asked else self._state.state
        self._change(heard=heard, state=state)

    def _add_failure(self, client_id: str, cause: str) -> None:
        failure = Failure(client_id=client_id, cause=cause[:MAX_CAUSE_LENGTH])
        self._change(
            failed=self._state.failed + 1,
            failures=(*self._state.failures, failure)[-MOST_FAILURES:],
        )

    def resent(self, client_id: str, attempt: int, cause: str) -> None:
        self._change(resent=self._state.resent + 1)

    def round_skipped(self, server_round: int, cause: str) -> None:
        self._change(cause=cause[:MAX_CAUSE_LENGTH])

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        self._change(state=WAITING, cause="")

    def close(self, state: str, cause: str = "") -> None:
        """Stop the thread and write how the run ended."""
        self._closed.set()
        self._changed.set()
        if self._thread is not None:
            self._thread.join()
            self._change(state=state, cause=cause[:MAX_CAUSE_LENGTH])
            self._write()

    def _change(self, **values: object) -> None:
        with self._lock:
            self._state = replace(self._state, **values)  # type: ignore[arg-type]  # by field name
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
            if not self._disk_error_logged:
                LOG.warning("%s is not written: %s", self.folder / "live.json", error)
            self._disk_error_logged = True
