"""A run folder as it is read without torch: is it one, and ``metrics.jsonl``, a round a line."""

from __future__ import annotations

import json
from pathlib import Path

from flexlora.errors import UserError

__all__ = ["missing_files", "read_rounds"]


def missing_files(folder: Path) -> str:
    """What a run folder has and this one has not, as ``no config.toml``; empty for a run folder."""
    names = ("config.toml", "environment.json")
    missing = [name for name in names if not (folder / name).is_file()]
    return f"no {' and '.join(missing)}" if missing else ""


def read_rounds(file: Path) -> list[dict]:
    """The rounds in ``file``, none where there is no file; a line without its end is left out.

    Raises:
        UserError: a line that is whole and is no round, for what comes after it would be lost.
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
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("round")) is int else None
