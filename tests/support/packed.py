"""Read and change the factors in a packed reply."""

from __future__ import annotations

from contextlib import contextmanager

from flwr.app import Array, ArrayRecord

from flexlora.server.transport.messages import scores_of
from flexlora.wire.packing import PACKED, pack_adapters, unpack_adapters


def trained(content):
    """Whether a reply holds factors."""
    return PACKED in content


def update_of(content):
    """What ``decode_adapter`` takes of a reply."""
    return unpack_adapters(content[PACKED], content["report"], ["update"])["update"]


@contextmanager
def tampered(content):
    """The factors of a reply and the lists beside them, to change; packed again at the end."""
    arrays, values = update_of(content)
    yield arrays, values
    packed, index = pack_adapters({"update": (arrays, values)})
    content["report"].update(index)
    content[PACKED] = ArrayRecord({PACKED: Array(**vars(packed))})


def scores(content):
    """The scores of an evaluation's reply by rank class."""
    return scores_of(content["report"])
