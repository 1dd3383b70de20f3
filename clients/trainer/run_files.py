"""The private files of old runs on a node: personal factors, and what int8 uploads rounded away.

Each run has a folder, ``run-ID``, which is of use for as long as the run goes on or is resumed.
No message comes at the end of a run, so they go by age and by size: a run's age is that of its
newest file. A run that comes back after that begins its personal factors anew, and its first upload
adds no error of an earlier one.

A folder is renamed before its files go: a crash halfway leaves no run with its older rounds alone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

__all__ = ["RunFiles"]


class RunFiles:
    """The runs' folders below ``folder``, at most ``max_bytes`` and ``max_seconds`` old."""

    def __init__(self, folder: Path, *, max_bytes: int, max_seconds: float) -> None:
        self.folder, self.max_bytes, self.max_seconds = folder, max_bytes, max_seconds
        for gone in folder.glob("removed-*"):
            shutil.rmtree(gone, ignore_errors=True)

    def of_run(self, run: str) -> Path:
        """The folder of one run."""
        return self.folder / f"run-{run}"

    def trim(self, *, at_work: Collection[Path] = ()) -> list[str]:
        """Remove the runs that are too old, then the oldest until the rest fits; their names.

        Those ``at_work`` stay, whatever they take.
        """
        runs = sorted((*_newest_and_size(path), path) for path in self.folder.glob("run-*"))
        total, removed = sum(size for _, size, _ in runs), []
        for newest, size, path in runs:
            too_old = time.time() - newest > self.max_seconds
            if path not in at_work and (total > self.max_bytes or too_old):
                gone = path.with_name(f"removed-{path.name}")
                path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
                total -= size
                removed.append(path.name)
        return removed

    def usage(self) -> tuple[int, int]:
        """The number of runs and the bytes of their files."""
        sizes = [_newest_and_size(path)[1] for path in self.folder.glob("run-*")]
        return len(sizes), sum(sizes)


def _newest_and_size(folder: Path) -> tuple[float, int]:
    """When the newest file was written, and the bytes of all; an empty folder is ages old."""
    newest, size = 0.0, 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # removed meanwhile
            found = path.stat()
            if path.is_file():
                newest, size = max(newest, found.st_mtime), size + found.st_size
    return newest, size
