"""Read ``metrics.jsonl``, one round per line, and recognise run folders; without torch."""

from __future__ import annotations

import json
from pathlib import Path

from flexlora.errors import UserError

__all__ = ["missing_files", "read_rounds"]


def missing_files(folder: Path) -> str:
    """The files that ``folder`` lacks to be a run folder, as ``no config.toml``; empty if none."""
    names = ("config.toml", "environment.json")
    missing = [name for name in names if not (folder / name).is_file()]
    return f"no {' and '.join(missing)}" if missing else ""


def read_rounds(file: Path) -> list[dict]:
    """The rounds in ``file``, without an incomplete last line; none if there is no file.

    Raises:
        UserError: a complete line that is not a round.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"'{file}' cannot be read: {error.strerror}.") from None
    *lines, cut = text.split("\n")
    rows = [_round(line) for line in lines]
    if None in rows:
        number = rows.index(None) + 1
        raise UserError(
            f"'{file}' is damaged in line {number} of {len(rows)}, expected one round a line; put "
            "the file back from a copy, or cut it before that line to go on from there."
        )
    last = _round(cut)
    return [row for row in (*rows, last) if row is not None]


def _round(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("round")) is int else None
