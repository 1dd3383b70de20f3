"""The rows that the cohort benchmark's parts write, and their table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from flexlora.report.console import make_console

__all__ = ["CohortRow", "print_rows", "write_rows"]


@dataclass(frozen=True, kw_only=True)
class CohortRow:
    """One ratio; it is to be at least ``target``, for memory at most; a target of 0 asks nothing.

    ``ours`` and ``other`` are the two numbers in ``unit`` that the ratio is made of.
    """

    name: str
    ratio: float
    target: float = 0.0
    error: float = 0.0
    allowed_error: float = 0.0
    at_most: bool = False
    ours: float = 0.0
    other: float = 0.0
    unit: str = ""

    @property
    def met(self) -> bool:
        reached = self.ratio <= self.target if self.at_most else self.ratio >= self.target
        return (reached or not self.target) and self.error <= self.allowed_error


def print_rows(title: str, rows: Sequence[CohortRow]) -> None:
    """The rows as a table on standard output."""
    table = Table(title=title)
    for column in ("what", "ours", "other", "unit", "ratio", "target", "error", "allowed", "met"):
        table.add_column(column, justify="left" if column in ("what", "unit", "met") else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.ours:,.4g}",
            f"{row.other:,.4g}",
            row.unit,
            f"{row.ratio:.2f}",
            f"{'<=' if row.at_most else '>='} {row.target:g}" if row.target else "",
            f"{row.error:.1e}" if row.allowed_error else "",
            f"{row.allowed_error:.1e}" if row.allowed_error else "",
            "yes" if row.met else "no",
        )
    make_console().print(table)


def write_rows(path: str, rows: Sequence[CohortRow]) -> None:
    """The rows as JSON, one object each."""
    Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
