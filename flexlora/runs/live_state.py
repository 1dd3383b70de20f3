"""``RUN/live.json``: where a run is at this moment, and who writes it.

The server replaces the file whole (``server/observing/live.py``); ``flexlora watch`` reads it. It
holds clock times, as ``environment.json`` does, so it differs between runs that are otherwise the
same.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

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
_PLAIN = {"str": str, "int": int, "float": float}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A client of the current round whose reply does not count, and why."""

    client_id: str
    cause: str


@dataclass(frozen=True, kw_only=True)
class LiveState:
    """One moment of a run. ``replied`` and ``failures`` hold the latest only; the counts are whole.

    ``heard`` counts all who were heard of in this round, those that failed among them. Times are
    seconds since the epoch on the server's clock.
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
        """Whether the run said its last word."""
        return self.state in ENDED


def write_live(folder: Path, state: LiveState) -> None:
    """Replace the file; not synced, since nothing is resumed from it."""
    partial = folder / (LIVE_FILE + ".partial")
    partial.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / LIVE_FILE)


def read_live(folder: Path) -> LiveState | None:
    """The last moment written; None where there is none, or a copy of it that is not whole."""
    try:
        return _decoded(json.loads((folder / LIVE_FILE).read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _decoded(found: Mapping[str, Any]) -> LiveState:
    """The values that this version knows, in their types."""
    values: dict[str, Any] = {
        own.name: _PLAIN[str(own.type)](found[own.name])
        for own in fields(LiveState)
        if own.name in found and str(own.type) in _PLAIN
    }
    values["replied"] = tuple(str(name) for name in found.get("replied", ()))
    values["failures"] = tuple(
        Failure(client_id=str(one["client_id"]), cause=str(one["cause"]))
        for one in found.get("failures", ())
    )
    values["classes"] = {str(k): int(v) for k, v in found.get("classes", {}).items()}
    return LiveState(**values)


def process_space() -> str:
    """This machine, and the PID namespace where there are such: where a process id means something.

    Containers of one host may share its name and not its processes.
    """
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()
