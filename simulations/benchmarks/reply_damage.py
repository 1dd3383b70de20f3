"""Damage a node's reply for ``reply_fuzz``: values, keys, records, and the bytes of arrays."""

from __future__ import annotations

import math
import random
from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict

__all__ = ["Arrays", "Content", "Values", "damaged"]

WORDS = (
    *("", "x" * 5000, "\x1b[2J", "=1+1", "\ud800", "a\x00b", "../../etc", "\u202eabc"),
    "layers.0.q",
)
NUMBERS = (0, -1, 1, 2, 7, 2**31, 2**40, 2**62, 2**63, 2**64, -(2**63), 10**30)
FLOATS = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-320, 1e38, 1e300, 0.5)
SCALARS: tuple[Any, ...] = (*WORDS, *NUMBERS, *FLOATS, True, False, b"", b"\xff" * 9, None)


class Arrays(dict[str, Array]):
    """A record of arrays without Flower's checks: a node need not run Flower's code."""


class Values(dict[str, Any]):
    """A record of anything."""


class Content(dict[str, Arrays | Values]):
    """The records of a reply, as the decoders read them."""

    @classmethod
    def of(cls, records: RecordDict) -> Content:
        content = cls()
        for name, record in records.items():
            values: Any = dict(record)
            content[name] = Arrays(values) if isinstance(record, ArrayRecord) else Values(values)
        return content

    def copy(self) -> Content:
        return Content({name: type(record)(record) for name, record in self.items()})

    @property
    def config_records(self) -> dict[str, Values]:
        return {name: record for name, record in self.items() if isinstance(record, Values)}

    @property
    def array_records(self) -> dict[str, Arrays]:
        return {name: record for name, record in self.items() if isinstance(record, Arrays)}


def damaged(content: Content, draws: random.Random) -> Content:
    """A copy with one to four changes."""
    copy = content.copy()
    for _ in range(draws.choice((1, 1, 1, 2, 4))):
        _change(copy, draws)
    return copy


def _change(content: Content, draws: random.Random) -> None:
    if not content or draws.random() < 0.03:
        return _change_records(content, draws)
    record = content[draws.choice(sorted(content))]
    if isinstance(record, Arrays):
        return _change_array(record, draws)
    if not record or draws.random() < 0.1:
        return _change_keys(record, draws)
    key = draws.choice(sorted(record))
    record[key] = _other(record[key], draws)
    return None


def _change_records(content: Content, draws: random.Random) -> None:
    """Remove a record, rename one, put another kind in its place, or repeat it."""
    name = draws.choice(sorted(content)) if content else "report"
    record: Arrays | Values = content.pop(name, Values())
    kind = draws.randrange(4)
    if kind == 1:
        content[name + "x"] = record
    elif kind == 2:
        others: list[Arrays | Values] = [Values(), Values(loss=1.0), Arrays()]
        content[name] = draws.choice(others)
    elif kind == 3:
        content[name] = content["another"] = record


def _change_keys(record: Values, draws: random.Random) -> None:
    """Remove a key, rename one, or add one."""
    key = draws.choice(sorted(record)) if record else "client-id"
    value = record.pop(key, 1)
    if draws.random() < 0.5:
        record[draws.choice([key + "x", key.upper(), "", "num-examples", "cause"])] = value


def _change_array(record: Arrays, draws: random.Random) -> None:
    key = draws.choice(sorted(record)) if record else "packed"
    if draws.random() < 0.05 or key not in record:
        record[draws.choice(["packed", "other", ""])] = Array("uint8", (0,), "flexlora.raw", b"")
        return
    old = record[key]
    dtype, shape, stype, data = old.dtype, tuple(old.shape), old.stype, bytes(old.data)
    field = draws.choice(["dtype", "shape", "stype", "data", "data", "data"])
    words = ["", "int8", "float32", "pickle", "numpy.ndarray", "uint8"]
    if field == "data":
        data = _other_bytes(data, draws)
        if draws.random() < 0.3:
            shape = (len(data),)
    elif field == "shape":
        sides = [0, 1, -1, 2**31, 2**62, 2**63, len(data)]
        shape = tuple(draws.choice(sides) for _ in range(draws.randrange(4)))
    elif field == "dtype":
        dtype = draws.choice(words)
    else:
        stype = draws.choice(words)
    record[key] = Array(dtype, shape, stype, data)


def _other_bytes(data: bytes, draws: random.Random) -> bytes:
    kind = draws.randrange(6)
    if kind == 0:
        return data[: draws.randrange(len(data) + 1)]
    if kind == 1:
        return data + bytes(draws.randrange(1, 64))
    if kind == 2:
        return b""
    changed = bytearray(data)
    if not changed:
        return b"\x00"
    at = draws.randrange(len(changed))
    if kind == 3:  # one number becomes NaN, infinity or the largest
        odd = draws.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"])
        changed[at - at % 4 : at - at % 4 + 4] = odd
        return bytes(changed[: len(data)])
    if kind == 4:  # many numbers of any size
        span = min(len(changed) - at, 64)
        changed[at : at + span] = draws.randbytes(span)
        return bytes(changed)
    changed[at] ^= 1 << draws.randrange(8)
    return bytes(changed)


def _other(value: Any, draws: random.Random) -> Any:
    """Another value: of the same type mostly, else of any."""
    if isinstance(value, list) and draws.random() < 0.8:
        return _other_list(value, draws)
    if isinstance(value, bytes) and draws.random() < 0.6:
        return _other_bytes(value, draws)
    if draws.random() < 0.6:
        same: dict[type, tuple] = {str: WORDS, int: NUMBERS, float: FLOATS, bool: (True, False)}
        if type(value) in same:
            return draws.choice(same[type(value)])
    return draws.choice([*SCALARS, [], [1, "a", None], ["x"] * 200, {}, [[1]]])


def _other_list(value: list, draws: random.Random) -> list:
    changed, kind = list(value), draws.randrange(6)
    at = draws.randrange(len(changed)) if changed else 0
    if kind == 0:
        return changed[:at]
    if kind == 1:
        return changed + changed[:1]
    if kind == 2:
        draws.shuffle(changed)
    elif kind == 3:
        return changed * 3
    elif changed:
        changed[at] = _other(changed[at], draws)
    return changed
