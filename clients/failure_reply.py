"""The reply of a node that cannot do what it was asked, made without loading torch.

A ClientApp whose trainer does not answer has no library loaded; ``messages.py`` needs it. A reply
marked ``transient`` has the server send the message again, as if Flower had lost it.
"""

from __future__ import annotations

import errno

from flwr.app import ConfigRecord, MessageType, RecordDict

from flexlora.errors import UserError, one_line

__all__ = ["Transient", "cause_of", "failure_reply", "is_transient", "reply_of"]

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class Transient(UserError):
    """A failure that may pass without anybody's doing: a trainer that restarts, one at work."""


def is_transient(error: BaseException) -> bool:
    """Whether the same message may succeed in a while; a full disk may have room again."""
    return isinstance(error, Transient) or (isinstance(error, OSError) and error.errno in NO_ROOM)


def reply_of(message_type: str, client_id: str, error: BaseException) -> RecordDict:
    """The failure reply for an exception."""
    transient = is_transient(error)
    return failure_reply(message_type, client_id, one_line(error), transient=transient)


def failure_reply(
    message_type: str, client_id: str, cause: str, *, transient: bool = False
) -> RecordDict:
    """The content of a reply that holds a cause and nothing else."""
    report = ConfigRecord({"client-id": client_id, "cause": cause})
    if transient:
        report["transient"] = True
    if message_type == MessageType.QUERY:
        return RecordDict({"capability": report})
    if message_type == MessageType.TRAIN:
        report.update({"rank-class": "", "base-round": 0, "digest": ""})
    return RecordDict({"report": report})


def cause_of(content: RecordDict) -> str:
    """Why a reply holds no result, "" where it holds one."""
    records = content.config_records
    record = records.get("report") or records.get("capability")
    if record is None and "secure" in records:  # of a phase of a secure sum
        return ""
    return str(record["cause"]) if record else "an empty reply"
