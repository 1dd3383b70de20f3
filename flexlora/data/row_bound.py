"""The rows of a node that may be used: its owner's choice, the same in every run.

A row's place is the SHA-256 of what it says, as a number in [0, 1). Of each split the rows below
``share`` may be used, and of these the first ``max_examples`` by place. So the choice depends on
the rows alone: no seed of a run draws others, a row that is added moves no other in or out of a
share, and the rows chosen are as good as drawn at random.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from flexlora.data.rows import Row

__all__ = ["RowBound", "bounded_rows"]


@dataclass(frozen=True, kw_only=True)
class RowBound:
    """``share`` of each split's rows, and at most ``max_examples`` of them (0: no bound)."""

    share: float = 1.0
    max_examples: int = 0


def bounded_rows(
    clients: Mapping[str, Mapping[str, list[Row]]], bound: RowBound
) -> dict[str, dict[str, list[Row]]]:
    """The clients with the rows of each split that may be used, in the original order."""
    return {
        client_id: {split: _chosen(rows, bound) for split, rows in splits.items()}
        for client_id, splits in clients.items()
    }


def _chosen(rows: list[Row], bound: RowBound) -> list[Row]:
    if bound.share >= 1.0 and not 0 < bound.max_examples < len(rows):
        return rows
    places = {k: _place(row) for k, row in enumerate(rows)}
    inside = [k for k, place in places.items() if place < bound.share or bound.share >= 1.0]
    first = sorted(inside, key=places.__getitem__)[: bound.max_examples or None]
    return [rows[k] for k in sorted(first)]


def _place(row: Row) -> float:
    said = [row.instruction, row.input, row.output, row.messages]
    digest = hashlib.sha256(json.dumps(said).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
