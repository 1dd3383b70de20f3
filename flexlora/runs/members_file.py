"""``RUN/members.json``: who the clients of a run are, and when each was heard last.

``clients.csv`` has rounds and no times. This file has one object per client: its node, rank class,
device and versions as it reported them, its last reply, the outcome of its last round; and the
causes of those left out. Only a deployed run has it; ``flexlora fleet list`` reads the newest one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "MEMBERS_FILE", "read_members"]

MEMBERS_FILE = "members.json"
FORMAT = 1


def read_members(file: Path) -> dict[str, Any]:
    """The file's object; an empty one where it is not there, or no such file."""
    empty: dict[str, Any] = {"written": "", "members": {}, "left_out": {}}
    try:
        read = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return empty
    fits = isinstance(read, dict) and read.get("format") == FORMAT
    parts = [read.get("members"), read.get("left_out")] if fits else [None]
    return empty | read if all(isinstance(part, dict) for part in parts) else empty
