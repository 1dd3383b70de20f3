"""Digests of rows: whether the rows that a run trains on are still the same, in the same order."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import fields
from operator import attrgetter
from typing import Any

from flexlora.data.collation import Example
from flexlora.data.rows import Row
from flexlora.data.sources import SPLITS

__all__ = ["ids_digest", "rows_digests"]

FIELDS = {field.name: attrgetter(field.name) for field in fields(Row)}


def rows_digests(clients: Mapping[str, Mapping[str, list[Row]]]) -> dict[str, str]:
    """``{split: "COUNT rows, SHA256"}`` over the clients' ids and rows, in order.

    A digest of what was read and dealt: it does not change with the spelling of the files. Field by
    field, since a loop over single rows would take ten times as long.
    """
    return {split: _digest(clients, split) for split in SPLITS}


def _digest(clients: Mapping[str, Mapping[str, list[Row]]], split: str) -> str:
    sha, count = hashlib.sha256(), 0
    for client_id, splits in clients.items():
        rows = splits.get(split, [])
        count += len(rows)
        _add(sha, "client", [client_id])
        for name, get in FIELDS.items():
            _add(sha, name, [*map(get, rows)])
    return f"{count} rows, {sha.hexdigest()[:32]}"


def _add(sha: hashlib._Hash, name: str, values: list[Any]) -> None:
    """The name of a field that any row has, and its texts with their lengths.

    ``None`` and the turns of a conversation are as Python spells them.
    """
    if values.count(None) == len(values):
        return
    try:
        joined, texts = "".join(values), values
    except TypeError:
        texts = [value if type(value) is str else repr(value) for value in values]
        joined = "".join(texts)
    sha.update(name.encode())
    sha.update(array("Q", map(len, texts)).tobytes())
    sha.update(joined.encode("utf-8", "surrogatepass"))


def ids_digest(examples: Iterable[Example]) -> str:
    """SHA-256 over the token ids of the examples."""
    found: list[Any] = [(e.prompt_length, e.input_ids) for e in examples]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:32]
