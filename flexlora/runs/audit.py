"""``RUN/audit.jsonl``: who contributed what to which checkpoint; lines are appended, never changed.

Every line names the SHA-256 of the line before it, so that none can be changed or taken out without
breaking the chain; the hash of the last line stands for all of them.

    {"previous", "time", "event": "started", "base", "wire", "method", "flexlora"}
    {..., "event": "round", "round", "checkpoint", "base", "wire", "skipped", "clients": [...]}
    {..., "event": "resumed" or "rolled back", "round", "checkpoint"}
    {..., "event": "adapters", "round", "files": {path below adapters/: SHA-256}}
    {..., "event": "published", "round", "to"}

A client of a round is ``{"client_id", "node_id", "outcome", "update", "num_examples", "weight",
"rank_class", "base_round"}``: ``update`` is the digest of the factors that came
(``Adapter.digest``), empty where none did, and ``weight`` how often its examples counted. The line
of a round is on disk before its checkpoint is the current one. ``audit_check.py`` verifies a log.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

__all__ = [
    "ADAPTERS",
    "AUDIT_FILE",
    "FIRST",
    "PUBLISHED",
    "RESUMED",
    "ROLLED_BACK",
    "ROUND",
    "STARTED",
    "AuditLog",
    "file_digests",
    "line_digest",
]

AUDIT_FILE = "audit.jsonl"
FIRST = "0" * 64  # what the first line has as the hash of the line before it
STARTED, ROUND, RESUMED = "started", "round", "resumed"
ROLLED_BACK, ADAPTERS, PUBLISHED = "rolled back", "adapters", "published"


class AuditLog:
    """Appends to one file; the caller holds the lock of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._head: str | None = None  # of the last line; None where it is to be read

    def append(self, event: str, **values: object) -> None:
        """Add one line and sync it.

        A last line without an end, which a crash leaves, is ended first and stays in the chain.

        Raises:
            OSError: it cannot be written.
        """
        head, ended = (self._head, True) if self._head is not None else self._last()
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"previous": head, "time": moment, "event": event, **values}).encode()
        self._head = None
        with self.path.open("ab") as file:
            file.write((b"" if ended else b"\n") + line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._head = line_digest(line)

    def _last(self) -> tuple[str, bool]:
        """The hash of the last line, and whether that has an end."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return FIRST, True
        if not data:
            return FIRST, True
        ended = data.endswith(b"\n")
        return line_digest(data.removesuffix(b"\n").rpartition(b"\n")[2]), ended


def line_digest(line: bytes) -> str:
    """The SHA-256 of one line without its end."""
    return hashlib.sha256(line).hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below ``folder``, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _file_digest(path) for path in files}


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
