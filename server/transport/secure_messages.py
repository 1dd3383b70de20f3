"""Encode the requests of a secure sum, decode the replies; values are checked in ``wire``.

The small phases are queries with a record ``secure`` beside a ``job`` that names round and base.
The masked update is the reply to a train message, whose job is followed by a ``secure`` record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from flwr.app import ConfigRecord, Message, RecordDict

from flexlora.errors import UpdateRefused
from flexlora.printable import printable
from flexlora.server.transport.fields import read_fields
from flexlora.server.transport.messages import error_words, words_of
from flexlora.wire.encoding import RAW
from flexlora.wire.jobs import TrainResult
from flexlora.wire.packing import VERSION_KEY
from flexlora.wire.secure_messages import (
    MASKED,
    SECURE,
    MaskedNote,
    from_values,
    to_values,
    value_bytes,
)

__all__ = [
    "decode_masked",
    "decode_phase",
    "phase_content",
    "secure_bytes",
    "with_request",
]

Reply = TypeVar("Reply")
LONGEST_CAUSE = 1000
JOB_KEYS = (VERSION_KEY, "server-round", "fingerprint", "origin")


def phase_content(request: object, train_job: ConfigRecord) -> RecordDict:
    """The content of a query of one phase, in the round of a train message's job."""
    job = ConfigRecord({key: train_job[key] for key in JOB_KEYS})
    return RecordDict({"job": job, SECURE: ConfigRecord(to_values(request))})


def with_request(content: RecordDict, request: object) -> RecordDict:
    """A train message's content with this client's part of the secure sum; arrays are shared."""
    return RecordDict({**content, SECURE: ConfigRecord(to_values(request))})


def secure_bytes(content: RecordDict) -> int:
    """Bytes that a secure sum adds to a message beside its arrays."""
    record = content.config_records.get(SECURE)
    return value_bytes(record) if record is not None else 0


def decode_phase(reply: Message, kind: type[Reply]) -> Reply:
    """The reply to one phase.

    Raises:
        UpdateRefused: an error, a failure with its cause, or what cannot be read.
    """
    if reply.has_error():
        raise UpdateRefused(error_words(reply))
    try:
        records = reply.content
        if SECURE in records:
            return from_values(kind, records[SECURE])
        record: Mapping = records.get("capability") or records["report"]
        raise UpdateRefused(printable(str(record["cause"]), LONGEST_CAUSE) or "no cause is given")
    except UpdateRefused:
        raise
    except Exception as error:  # whatever it is, the node sent it
        raise UpdateRefused(f"unreadable reply: {words_of(error)}") from None


def decode_masked(reply: Message) -> tuple[TrainResult, MaskedNote | None, bytes]:
    """The report of a training and the masked numbers, none where it failed.

    Raises:
        UpdateRefused: an error reply or one that cannot be read, with its cause.
    """
    if reply.has_error():
        raise UpdateRefused(error_words(reply))
    try:
        records = reply.content
        result = TrainResult(**read_fields(TrainResult, records["report"]))
        if MASKED not in records or result.cause:
            return result, None, b""
        note = from_values(MaskedNote, records[SECURE])
        array = records.array_records[MASKED][MASKED]
        data = bytes(array.data)
        if (array.stype, array.dtype, tuple(array.shape)) != (RAW, "uint8", (len(data),)):
            raise ValueError(f"the array is {array.stype:.40}/{array.dtype:.40}, expected bytes")
        return result, note, data
    except UpdateRefused:
        raise
    except Exception as error:  # whatever it is, the node sent it
        raise UpdateRefused(f"unreadable reply: {words_of(error)}") from None
