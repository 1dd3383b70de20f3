"""Snapshots of a run folder: records and liveness of the writing process.

The folder may be written concurrently, rewound by a resume, or be on another machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from flexlora.errors import UserError, nearest
from flexlora.report.records import SERIES_FILE, RunRecords, read_run
from flexlora.runs.live_state import (
    FINISHED,
    HEARTBEAT_SECONDS,
    LiveState,
    process_space,
    read_live,
)

__all__ = ["Snapshot", "SnapshotReader", "find_run"]

RUNS = "runs"
DEPTH = 3  # runs/NAME, runs/NAME/seed-0, runs/methods/NAME/seed-0
SILENT_SECONDS = 6 * HEARTBEAT_SECONDS
GRACE_SECONDS = 10.0  # for a run that is about to write its first live.json


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at the time ``now``, in seconds since the epoch on this machine's clock.

    ``trouble`` is the problem of a run that should be in progress, or empty. ``over`` is True when
    the run finished or failed, or its process has ended.
    """

    records: RunRecords
    live: LiveState | None
    trouble: str
    over: bool
    now: float

    @property
    def finished(self) -> bool:
        """Whether the run completed all its rounds, by ``live.json`` or else by its records."""
        if self.live is not None and self.live.ended:
            return self.live.state == FINISHED
        return self.over and self.records.finished


class SnapshotReader:
    """Reads snapshots of one folder; the tables are parsed again only when they have changed.

    Raises:
        UserError: it is no run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._signature: object = None
        self._records = read_run(folder)
        self._began = time.monotonic()
        self._last: tuple[float, float] | None = None  # LiveState.updated, and when it changed

    def __call__(self) -> Snapshot:
        """The run as it is now.

        Raises:
            UserError: the folder was deleted.
        """
        live = read_live(self.folder)
        self._read()
        trouble, over = self._trouble(live)
        now = time.time()
        return Snapshot(records=self._records, live=live, trouble=trouble, over=over, now=now)

    def _read(self) -> None:
        signature = [_stamp(self.folder / name) for name in ("config.toml", "metrics.jsonl")]
        if signature == self._signature:
            return
        try:
            self._records = read_run(self.folder)
        except UserError:
            if not self.folder.is_dir():
                raise UserError(f"run folder '{self.folder}' has gone.") from None
            return  # being created again: keep the last records
        self._signature = signature

    def _trouble(self, live: LiveState | None) -> tuple[str, bool]:
        """``Snapshot.trouble`` and ``Snapshot.over``."""
        if live is None:
            if self._records.finished:
                return "", True
            waited = time.monotonic() - self._began > GRACE_SECONDS
            return "nothing says whether this run goes on: it has no live.json", waited
        if live.ended:
            return "", True
        age = self._silence(live)
        if live.host == process_space() and not _is_alive(live):
            return f"no sign of life for {age:.0f} s: its process {live.pid} has gone", True
        return (f"no sign of life for {age:.0f} s", False) if age > SILENT_SECONDS else ("", False)

    def _silence(self, live: LiveState) -> float:
        """Seconds since ``live.json`` last changed.

        The writer's clock, which may differ from this one, is used at the first read only.
        """
        now = time.monotonic()
        if self._last is None:
            self._last = live.updated, now - max(0.0, time.time() - live.updated)
        elif self._last[0] != live.updated:
            self._last = live.updated, now
        return now - self._last[1]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """``(mtime, size, inode)``, which every append or replacement changes."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _is_alive(live: LiveState) -> bool:
    """Whether the process that wrote ``live.json`` still runs (not another with its id)."""
    import psutil

    try:
        process = psutil.Process(live.pid)
        same = process.create_time() <= live.started + 5
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def find_run(target: str | None, *, runs: Path = Path(RUNS)) -> Path:
    """The run folder ``target``, or the one under ``runs`` that changed last.

    Raises:
        UserError: there is no such folder, or no run at all.
    """
    if target is None:
        folders = _run_folders(runs)
        if not folders:
            raise UserError(f"there is no run under '{runs}'; name a run folder.")
        return max(folders, key=_last_change)
    folder = Path(target)
    if not folder.exists():
        siblings = [str(path) for path in (*_run_folders(folder.parent), *_run_folders(runs))]
        raise UserError(f"run folder '{target}' does not exist.{nearest(target, siblings)}")
    if (folder / SERIES_FILE).is_file():
        return max(_run_folders(folder), key=_last_change, default=folder)
    return folder


def _run_folders(under: Path) -> list[Path]:
    patterns = ("/".join(["*"] * depth) for depth in range(1, DEPTH + 1))
    folders = (file.parent for p in patterns for file in under.glob(f"{p}/environment.json"))
    return [folder for folder in folders if (folder / "config.toml").is_file()]


def _last_change(folder: Path) -> int:
    stamps = (_stamp(folder / n) for n in ("live.json", "metrics.jsonl", "environment.json"))
    return max((stamp[0] for stamp in stamps if stamp is not None), default=0)
