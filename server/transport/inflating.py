"""Make a ``Message`` of the objects of a reply: whatever a node sends, it is a message or a cause.

Flower's ``inflate`` trusts what it reads: a chunk that is named a million times is copied a million
times, a child that is missing is a ``KeyError``, a body that is no protobuf a ``DecodeError``. Here
the arrays are put together first, by their summed size, and everything else is inflated in a guard.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping

from flwr.app import Array, Message

from flexlora.errors import one_line
from flexlora.server.transport.flower_private import inflate_object_from_contents, object_head

__all__ = ["Unreadable", "inflated"]


class Unreadable(Exception):
    """A reply that is no message, or too large; the message of the error is its cause."""


def inflated(reply_id: str, contents: MutableMapping[str, bytes], most_bytes: int) -> Message:
    """The message whose objects these are; ``contents`` is emptied on the way.

    The bytes of the arrays are in memory twice at most.

    Raises:
        Unreadable: they are not the objects of a message, or their arrays have more than
            ``most_bytes``.
    """
    try:
        kinds = {object_id: object_head(content)[0] for object_id, content in contents.items()}
        arrays, left = {}, most_bytes
        for object_id in (name for name, kind in kinds.items() if kind == "Array"):
            arrays[object_id] = _array(contents[object_id], contents, left)
            left -= len(arrays[object_id].data)
        for object_id in (name for name, kind in kinds.items() if kind == "ArrayChunk"):
            del contents[object_id]
        message = inflate_object_from_contents(reply_id, dict(contents), objects=dict(arrays))
    except Unreadable:
        raise
    except Exception as error:  # what a stranger wrote may raise anything, RecursionError included
        raise Unreadable(f"unreadable reply: {one_line(error)}"[:300]) from None
    if not isinstance(message, Message):
        raise Unreadable(f"unreadable reply: a {type(message).__name__}, expected a message")
    return message


def _array(content: bytes, contents: MutableMapping[str, bytes], most_bytes: int) -> Array:
    """An array with the bytes of its chunks."""
    _, children, _ = object_head(content)
    fields = json.loads(_body(content).tobytes())
    bodies = [_body(contents[child]) for child in children]
    chunks = [bodies[place] for place in fields["arraychunk_ids"]]
    size = sum(len(chunk) for chunk in chunks)
    if size > most_bytes:
        raise Unreadable(f"arrays of {size:,} bytes or more, expected at most {most_bytes:,}")
    shape = tuple(fields["shape"])
    return Array(fields["dtype"], shape, fields["stype"], b"".join(chunks))


def _body(content: bytes) -> memoryview:
    """What follows the head and its zero byte."""
    return memoryview(content)[content.index(b"\0") + 1 :]
