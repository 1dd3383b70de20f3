"""A rank for every client from a file: ``ranks.policy=file``, ``ranks.file=TABLE``.

CSV, with one row per client; ``pattern`` and ``carried_rank`` may be missing or empty:

    client_id,rank,pattern,carried_rank
    site_1,8,,64
    site_2,8,mlp=16; q_proj=32,

TOML, one entry per client, a rank alone or a table:

    site_1 = 8
    site_2 = {rank = 8, pattern = {mlp = 16, q_proj = 32}, carried_rank = 64}

A pattern is a regular expression, searched for in module names; the first match counts.
"""

from __future__ import annotations

import csv
import re
import tomllib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexlora.config.paths import read_text
from flexlora.errors import UserError, nearest
from flexlora.lora.ranks import RankClass

__all__ = ["read_rank_table"]

_FIELDS = ("rank", "pattern", "carried_rank")


def read_rank_table(path: str) -> dict[str, RankClass]:
    """The rank class of every client in the file.

    Raises:
        UserError: a file that is missing or cannot be read, a client named twice, a rank that is
            not a whole number of at least 1, an unknown field or an invalid expression.
    """
    if not path:
        raise UserError("ranks.policy is 'file' and ranks.file is empty, expected a .csv or .toml.")
    suffix = Path(path).suffix
    if suffix not in (".csv", ".toml"):
        raise UserError(f"ranks.file is '{path}', expected a file that ends in .csv or .toml.")
    read, text = _read_csv if suffix == ".csv" else _read_toml, read_text(path, "ranks.file")
    try:
        entries = list(read(path, text))
    except (tomllib.TOMLDecodeError, RecursionError, csv.Error) as error:
        raise UserError(f"ranks.file '{path}' cannot be read: {error}.") from None
    table: dict[str, RankClass] = {}
    for client_id, fields in entries:
        if client_id in table:
            raise UserError(f"ranks.file '{path}' names client '{client_id}' twice.")
        table[client_id] = _rank_class(f"ranks.file '{path}', client '{client_id}'", fields)
    if not table:
        raise UserError(f"ranks.file '{path}' names no client.")
    return table


def _read_csv(path: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    names = [name or "" for name in reader.fieldnames or ()]
    for wanted in ("client_id", "rank"):
        if wanted not in names:
            raise UserError(
                f"ranks.file '{path}' has the columns {', '.join(names) or 'none'}, "
                f"expected client_id and rank, and maybe pattern and carried_rank."
            )
    for row in reader:
        fields = {k: v for k, v in row.items() if k != "client_id" and v not in ("", None)}
        if isinstance(fields.get("pattern"), str):
            items = [item.strip() for item in fields["pattern"].split(";") if item.strip()]
            pairs = [item.rpartition("=") for item in items]
            fields["pattern"] = {regex.strip(): rank.strip() for regex, _, rank in pairs}
        yield (row["client_id"] or "").strip(), fields


def _read_toml(path: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for client_id, entry in tomllib.loads(text).items():
        yield client_id, entry if isinstance(entry, dict) else {"rank": entry}


def _rank_class(who: str, fields: Mapping[str, Any]) -> RankClass:
    odd = [name for name in fields if name not in _FIELDS]
    if odd:
        known = ", ".join(_FIELDS)
        hint = nearest(str(odd[0]), _FIELDS)
        raise UserError(f"{who}: unknown field '{odd[0]}', expected {known}.{hint}")
    if "rank" not in fields:
        raise UserError(f"{who}: there is no rank, expected a whole number of at least 1.")
    ranks = {k: _whole(f"{who}: {k}", fields[k]) for k in ("rank", "carried_rank") if k in fields}
    plain = RankClass.of(ranks["rank"], carried_rank=ranks.get("carried_rank", 0))
    given = fields.get("pattern", {})
    if not isinstance(given, dict):
        raise UserError(f"{who}: pattern is {given!r}, expected regular expressions with ranks.")
    pattern = tuple((regex, _pattern_rank(who, regex, rank)) for regex, rank in given.items())
    if not pattern:
        return plain
    digest = zlib.crc32(repr(pattern).encode())  # clients with the same ranks are one class
    return replace(plain, name=f"{plain.name}_pattern_{digest:08x}", pattern=pattern)


def _pattern_rank(who: str, regex: str, rank: Any) -> int:
    try:
        re.compile(regex)
    except re.error as error:
        raise UserError(f"{who}: pattern '{regex}' is no regular expression: {error}.") from None
    return _whole(f"{who}: the rank of pattern '{regex}'", rank)


def _whole(what: str, value: Any) -> int:
    text = str(value).strip()
    if isinstance(value, bool | float) or not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"{what} is {value!r}, expected a whole number of at least 1.")
    return int(text)
