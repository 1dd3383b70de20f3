"""Encode a Flower message's content as a header and a stream of bytes, without torch.

    RecordDict  <->  Content (names, shapes, values, SHA-256 of the bytes)  +  parts up to 1 MiB

Arrays follow each other without gaps; a message of ours holds one (``packing.py``). Parts are cut
lazily and joined as they come: one part is held twice, never the whole content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from flexlora.clients.trainer.trainer_pb2 import ArraySpec, Content, Entry, Record, Value

__all__ = [
    "PART_BYTES",
    "ContentRefused",
    "array_bytes",
    "array_parts",
    "decode_content",
    "decode_entries",
    "encode_entries",
    "encode_header",
]

PART_BYTES = 2**20
_SCALARS = {bool: "flag", int: "whole", float: "number", str: "text", bytes: "raw"}


class ContentRefused(ValueError):
    """A header or bytes that do not match; nothing was done with them."""


def encode_header(content: Mapping[str, object]) -> Content:
    """The header of a content; reads its arrays' bytes once, for the digest.

    Raises:
        ContentRefused: a record or a value of a type that a header cannot hold.
    """
    records = [_record(name, record) for name, record in content.items()]
    digest = hashlib.sha256()
    for array in _arrays(content):
        digest.update(array.data)
    return Content(records=records, digest=digest.digest())


def array_bytes(header: Content) -> int:
    """Bytes of all arrays in a header."""
    return sum(spec.size for record in header.records for spec in record.arrays.items)


def array_parts(content: Mapping[str, object]) -> Iterator[bytes]:
    """The bytes of all arrays, end to end, cut every ``PART_BYTES``."""
    waiting = bytearray()
    for array in _arrays(content):
        view, at = memoryview(array.data), 0
        while at < len(view):
            taken = view[at : at + PART_BYTES - len(waiting)]
            waiting += taken
            at += len(taken)
            if len(waiting) == PART_BYTES:
                yield bytes(waiting)
                waiting.clear()
    if waiting:
        yield bytes(waiting)


def decode_content(header: Content, parts: Iterable[bytes]) -> RecordDict:
    """The content of ``header`` with its arrays' bytes read from ``parts``.

    Raises:
        ContentRefused: too many or too few bytes, another digest, a name given twice.
    """
    feed, content = _PartReader(parts), RecordDict()
    for record in header.records:
        if record.name in content:
            raise ContentRefused(f"the record '{record.name}' comes twice.")
        kind = record.WhichOneof("kind")
        if kind == "arrays":
            content[record.name] = ArrayRecord(_named_arrays(record, feed))
        elif kind == "values":
            content[record.name] = ConfigRecord(decode_entries(record.values.entries))
        else:
            raise ContentRefused(f"the record '{record.name}' holds nothing.")
    feed.end(header.digest)
    return content


def encode_entries(values: Mapping[str, object]) -> list[Entry]:
    """Entries of scalars and of lists of scalars of one type."""
    return [Entry(key=key, value=_value(key, value)) for key, value in values.items()]


def decode_entries(entries: Iterable[Entry]) -> dict[str, Any]:
    """The inverse of ``encode_entries``.

    Raises:
        ContentRefused: a key given twice, or one without a value.
    """
    values: dict[str, Any] = {}
    for entry in entries:
        kind = entry.value.WhichOneof("kind")
        if kind is None or entry.key in values:
            raise ContentRefused(f"'{entry.key}' comes {'twice' if kind else 'without a value'}.")
        held = getattr(entry.value, kind)
        values[entry.key] = list(held.items) if hasattr(held, "items") else held
    return values


def _record(name: str, record: object) -> Record:
    made = Record(name=name)
    if isinstance(record, ConfigRecord):
        made.values.entries.extend(encode_entries(record))
        made.values.SetInParent()  # keeps a record without entries
        return made
    if isinstance(record, ArrayRecord):
        made.arrays.items.extend(
            ArraySpec(key=key, dtype=a.dtype, shape=a.shape, stype=a.stype, size=len(a.data))
            for key, a in record.items()
        )
        made.arrays.SetInParent()
        return made
    raise ContentRefused(
        f"the record '{name}' is {type(record).__name__}, expected arrays or values."
    )


def _value(key: str, value: object) -> Value:
    """One value under the name of its type; an empty list counts as one of texts."""
    made, items = Value(), value if isinstance(value, list) else [value]
    kinds = {type(item) for item in items} or {str}
    if len(kinds) > 1 or not kinds <= _SCALARS.keys():
        wanted = "a list of one type of scalar" if value is items else "a scalar or a list of them"
        raise ContentRefused(f"'{key}' is {value!r}, expected {wanted}.")
    name = _SCALARS[kinds.pop()]
    if isinstance(value, list):
        held = getattr(made, f"{name}s")
        held.items.extend(value)
        held.SetInParent()  # keeps an empty list
    else:
        setattr(made, name, value)
    return made


def _arrays(content: Mapping[str, object]) -> Iterator[Array]:
    for record in content.values():
        if isinstance(record, ArrayRecord):
            yield from record.values()


def _named_arrays(record: Record, feed: _PartReader) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for spec in record.arrays.items:
        if spec.key in arrays:
            raise ContentRefused(f"the array '{spec.key}' comes twice.")
        data = feed.take(spec.size)
        arrays[spec.key] = Array(spec.dtype, tuple(spec.shape), spec.stype, data)
    return arrays


class _PartReader:
    """Reads arrays out of parts; one part is held beside the array that it is written to."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts, self._left = iter(parts), memoryview(b"")
        self._digest = hashlib.sha256()

    def take(self, size: int) -> bytes:
        taken = BytesIO()  # grows as parts come, whatever size a header claims
        while size:
            if not self._left:
                self._left = self._next()
            piece = self._left[:size]
            taken.write(piece)
            size -= len(piece)
            self._left = self._left[len(piece) :]
        return taken.getvalue()

    def _next(self) -> memoryview:
        for part in self._parts:
            if not 0 < len(part) <= PART_BYTES:
                raise ContentRefused(f"a part has {len(part)} bytes, expected 1 to {PART_BYTES}.")
            self._digest.update(part)
            return memoryview(part)
        raise ContentRefused("the bytes end before the last array does.")

    def end(self, digest: bytes) -> None:
        if self._left or next(self._parts, None) is not None:
            raise ContentRefused("there are more bytes than the arrays take.")
        if self._digest.digest() != digest:
            raise ContentRefused("the bytes are not those of the digest.")
