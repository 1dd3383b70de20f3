"""Read and change the factors in a packed reply."""

from __future__ import annotations

from contextlib import contextmanager

from flwr.app import Array, ArrayRecord

from flexlora.server.transport.messages import scores_of
from flexlora.wire.encoding import RAW
from flexlora.wire.packing import DATA, PACKED, pack_adapters, unpack_adapters


def trained(content):
    """Whether a reply holds factors."""
    return PACKED in content or any(DATA in record for record in content.config_records.values())


def update_of(content):
    """What ``decode_adapter`` takes of a reply."""
    return unpack_adapters(content.get(PACKED, {}), content["report"], ["update"])["update"]


def packed_bytes(content):
    """The factors of a job or a reply as they are sent."""
    if PACKED in content:
        return bytes(content[PACKED][PACKED].data)
    return next(record[DATA] for record in content.config_records.values() if DATA in record)


def as_array(content):
    """Have a job or a reply bring its factors as many bytes are sent: in an array."""
    data = next(record for record in content.config_records.values() if DATA in record).pop(DATA)
    content[PACKED] = ArrayRecord({PACKED: Array("uint8", (len(data),), RAW, data)})


@contextmanager
def tampered(content):
    """The factors of a reply and the lists beside them, to change; packed again at the end."""
    arrays, values = update_of(content)
    yield arrays, values
    packed, index = pack_adapters({"update": (arrays, values)})
    content["report"].update(index)
    if packed is not None:
        content[PACKED] = ArrayRecord({PACKED: Array(**vars(packed))})


def scores(content):
    """The scores of an evaluation's reply by rank class."""
    return scores_of(content["report"])
