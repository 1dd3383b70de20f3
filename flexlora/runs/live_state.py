"""``RUN/live.json``: the progress of a run and the process that writes it.

The server replaces the whole file (``server/observing/live.py``); ``flexlora watch`` reads it. It
has clock times, so it differs between otherwise identical runs.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

__all__ = [
    "HEARTBEAT_SECONDS",
    "LIVE_FILE",
    "Failure",
    "LiveState",
    "process_space",
    "read_live",
    "write_live",
]

LIVE_FILE = "live.json"
HEARTBEAT_SECONDS = 5.0
MEETING, WAITING, TRAINING, EVALUATING = "meeting", "waiting", "training", "evaluating"
FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"
ENDED = (FINISHED, FAILED, INTERRUPTED)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A client of the current round without a valid reply, and the cause."""

    client_id: str
    cause: str


@dataclass(frozen=True, kw_only=True)
class LiveState:
    """Progress of a run; ``replied`` and ``failures`` are the latest only, the counts complete.

    ``heard`` counts the clients with a reply or a failure in this round. Times are seconds since
    the epoch on the server's clock.
    """

    state: str
    cause: str = ""
    round: int = 0
    num_rounds: int = 0
    asked: int = 0
    heard: int = 0
    failed: int = 0
    resent: int = 0
    replied: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()
    classes: Mapping[str, int] = field(default_factory=dict)
    left_out: int = 0
    started: float = 0.0
    round_started: float = 0.0
    updated: float = 0.0
    pid: int = 0
    host: str = ""

    @property
    def ended(self) -> bool:
        """Whether the run finished, failed or was interrupted."""
        return self.state in ENDED


def write_live(folder: Path, state: LiveState) -> None:
    """Replace the file, without a sync: a resume does not read it."""
    partial = folder / (LIVE_FILE + ".partial")
    partial.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / LIVE_FILE)


def read_live(folder: Path) -> LiveState | None:
    """The last state written, without unknown keys; None if it is missing or damaged."""
    try:
        return TypeAdapter(LiveState).validate_json((folder / LIVE_FILE).read_bytes())
    except (OSError, ValueError):
        return None


def process_space() -> str:
    """The host name and the PID namespace, if any: the scope in which a process id is valid.

    Containers of one host may have the same host name and different processes.
    """
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()
