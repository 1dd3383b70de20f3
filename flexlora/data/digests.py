"""Digests of rows: whether the rows that a run trains on are still the same, in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from flexlora.data.collation import Example
from flexlora.data.rows import Row
from flexlora.data.sources import SPLITS

__all__ = ["ids_digest", "rows_digests"]


def rows_digests(clients: Mapping[str, Mapping[str, list[Row]]]) -> dict[str, str]:
    """``{split: "COUNT rows, SHA256"}`` over the clients' ids and rows, in order.

    A digest of what was read and dealt: it does not change with the spelling of the files. About
    a microsecond a row.
    """
    return {split: _digest(clients, split) for split in SPLITS}


def _digest(clients: Mapping[str, Mapping[str, list[Row]]], split: str) -> str:
    sha, count = hashlib.sha256(), 0
    for client_id, splits in clients.items():
        rows = splits.get(split, [])
        count += len(rows)
        texts = [repr(client_id), str(len(rows)), *(repr([*vars(row).values()]) for row in rows)]
        sha.update("\n".join(texts).encode("utf-8", "surrogatepass"))
    return f"{count} rows, {sha.hexdigest()[:32]}"


def ids_digest(examples: Iterable[Example]) -> str:
    """SHA-256 over the token ids of the examples."""
    found: list[Any] = [(e.prompt_length, e.input_ids) for e in examples]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:32]
