"""The messages of a secure sum between the server and one client, as plain values.

    KeysRequest     -> KeysReply      the client's two public keys of this round
    SharesRequest   -> SharesReply    its neighbours' keys; shares of its secrets, sealed for them
    MaskRequest     -> masked numbers the neighbours' shares, beside the job of a train message
    UnmaskRequest   -> UnmaskReply    who answered and who did not; one kind of share of each

A client is a ``place`` from 1 up in its round. ``clients/secure/session.py`` and
``server/rounds/secure_sum.py`` are the two sides. Every value is checked for its type and size when
it is read; what it means is theirs to judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

__all__ = [
    "MASKED",
    "SECURE",
    "SESSION_BYTES",
    "KeysReply",
    "KeysRequest",
    "MaskRequest",
    "MaskedNote",
    "SharesReply",
    "SharesRequest",
    "UnmaskReply",
    "UnmaskRequest",
    "canonical",
    "from_values",
    "of_canonical",
    "phase_of",
    "to_values",
    "value_bytes",
]

SECURE = "secure"  # the record in a message's content
MASKED = "masked"  # the record, and the array in it, of masked numbers
SESSION_BYTES = 16
LONGEST_LIST, LONGEST_BYTES, LONGEST_TEXT, LARGEST_NUMBER = 100_000, 2**24, 2**20, 2**63 - 1
NUMBER_BYTES = 8
Message = TypeVar("Message")


@dataclass(frozen=True, kw_only=True)
class KeysRequest:
    """Begin a session of this round with new keys."""

    server_round: int
    session: bytes


@dataclass(frozen=True, kw_only=True)
class KeysReply:
    """``channel`` is the key under which shares are sealed, ``mask`` that of masks."""

    server_round: int
    session: bytes
    channel: bytes
    mask: bytes


@dataclass(frozen=True, kw_only=True)
class SharesRequest:
    """The graph round one client, and what all clients of the round must agree on.

    Args:
        place: the client's own.
        threshold: the shares that open a secret of the client.
        holders: its neighbours in the first band, who hold its shares; their ``channels`` keys,
            end to end.
        peers: its neighbours in any band, ascending, with their ``masks`` keys.
        bands: the bands that it is in, and of each how many clients it has.
        counts: how many of ``graph`` are its neighbours in each band, in turn.
        seed: of the rotations.
        clip: the norm of an update.
        largest: the most examples of any client of the round; 1 where all count alike.
        min_group: the least clients whose sum the server may learn.
        pooled: all columns are one band, in which those that a client lacks are zeros.
    """

    server_round: int
    session: bytes
    place: int
    threshold: int
    holders: tuple[int, ...]
    channels: bytes
    peers: tuple[int, ...]
    masks: bytes
    bands: tuple[int, ...]
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    graph: tuple[int, ...]
    seed: int
    clip: float
    largest: int
    min_group: int
    pooled: bool

    @property
    def neighbours(self) -> dict[int, tuple[int, ...]]:
        """By band."""
        found, at = {}, 0
        for band, count in zip(self.bands, self.counts, strict=True):
            found[band], at = self.graph[at : at + count], at + count
        return found


@dataclass(frozen=True, kw_only=True)
class SharesReply:
    """A sealed box for each holder, in their order, and a digest of the seed of each band."""

    server_round: int
    session: bytes
    boxes: tuple[bytes, ...]
    digests: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class MaskRequest:
    """Who else is asked to train, and the boxes of those of them who hold the client's shares.

    ``classes`` are the rank classes of the round as JSON, ``bands`` those to send.
    """

    server_round: int
    session: bytes
    alive: tuple[int, ...]
    boxes: tuple[bytes, ...]
    classes: str
    bands: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MaskedNote:
    """Beside the masked numbers, so that a reply of another round is recognised."""

    server_round: int
    session: bytes


@dataclass(frozen=True, kw_only=True)
class UnmaskRequest:
    """Of the neighbours that were asked to train: who answered, who did not; the bands to open."""

    server_round: int
    session: bytes
    alive: tuple[int, ...]
    dropped: tuple[int, ...]
    bands: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class UnmaskReply:
    """Shares of those whose shares the client holds; empty where it could not open a box.

    ``seeds`` has, for each such client of ``alive``, the shares of its seeds in the bands that it
    is in and that are opened, end to end; ``keys`` the share of the mask key of each in
    ``dropped``.
    """

    server_round: int
    session: bytes
    seeds: tuple[bytes, ...]
    keys: tuple[bytes, ...]


KINDS: dict[str, type] = {
    "keys": KeysRequest,
    "shares": SharesRequest,
    "mask": MaskRequest,
    "unmask": UnmaskRequest,
}


def phase_of(message: object) -> str:
    """The phase of a request."""
    return next(phase for phase, kind in KINDS.items() if isinstance(message, kind))


def to_values(message: Any) -> dict[str, Any]:
    """Scalars and lists of scalars, as any transport can hold them; a request names its phase."""
    values: dict[str, Any] = {}
    if type(message) in KINDS.values():
        values["phase"] = phase_of(message)
    for field in fields(message):
        value = getattr(message, field.name)
        key = field.name.replace("_", "-")
        values[key] = list(value) if isinstance(value, tuple) else value
    return values


def from_values(kind: type[Message], record: Mapping[str, Any]) -> Message:
    """The message in a record that has at least its fields.

    Raises:
        ValueError: a field is missing, of another type, or larger than any real one.
    """
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        key = field.name.replace("_", "-")
        if key not in record:
            raise ValueError(f"'{key}' is missing")
        values[field.name] = _checked(key, record[key], str(field.type))
    return kind(**values)


def _checked(key: str, value: Any, annotation: str) -> Any:
    if annotation.startswith("tuple["):
        if not isinstance(value, list) or len(value) > LONGEST_LIST:
            raise ValueError(f"'{key}' is no list of at most {LONGEST_LIST:,}")
        inner = annotation.removeprefix("tuple[").split(",")[0]
        return tuple(_checked(key, item, inner) for item in value)
    if type(value).__name__ != annotation:
        raise ValueError(f"'{key}' is {type(value).__name__}, expected {annotation}")
    if isinstance(value, int) and not 0 <= value <= LARGEST_NUMBER:
        raise ValueError(f"'{key}' is {value:.3g}, expected 0 to {LARGEST_NUMBER:.3g}")
    if isinstance(value, float) and not 0.0 <= value < float("inf"):
        raise ValueError(f"'{key}' is {value}, expected a finite number from 0 up")
    if isinstance(value, bytes | str):
        most = LONGEST_BYTES if isinstance(value, bytes) else LONGEST_TEXT
        if len(value) > most:
            raise ValueError(f"'{key}' has {len(value):,} bytes, expected at most {most:,}")
    if key == "session" and len(value) != SESSION_BYTES:
        raise ValueError(f"'session' has {len(value)} bytes, expected {SESSION_BYTES}")
    return value


def canonical(message: Any) -> bytes:
    """One encoding of a request, to compare it with another and to keep it."""
    values = to_values(message)
    return json.dumps(values, sort_keys=True, default=bytes.hex).encode()


def of_canonical(kind: type[Message], data: bytes) -> Message:
    """The inverse of ``canonical``; the bytes are this machine's own."""
    record = json.loads(data)
    for field in fields(kind):  # type: ignore[arg-type]
        key, annotation = field.name.replace("_", "-"), str(field.type)
        if annotation == "bytes":
            record[key] = bytes.fromhex(record[key])
        elif annotation.startswith("tuple[bytes"):
            record[key] = [bytes.fromhex(item) for item in record[key]]
    return from_values(kind, record)


def value_bytes(record: Mapping[str, Any]) -> int:
    """Bytes of the values in a record as they travel, without their names."""
    return sum(_size(value) for value in record.values())


def _size(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(_size(item) for item in value)
    return len(value) if isinstance(value, bytes | str) else NUMBER_BYTES
