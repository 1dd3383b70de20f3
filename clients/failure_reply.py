"""The reply of a node that cannot do what it was asked, made without loading torch.

A ClientApp whose trainer does not answer has no library loaded; ``messages.py`` needs it.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, MessageType, RecordDict

__all__ = ["cause_of", "failure_reply"]


def failure_reply(message_type: str, client_id: str, cause: str) -> RecordDict:
    """The content of a reply that holds a cause and nothing else."""
    if message_type == MessageType.QUERY:
        return RecordDict({"capability": ConfigRecord({"client-id": client_id, "cause": cause})})
    report = ConfigRecord({"client-id": client_id, "cause": cause})
    if message_type == MessageType.TRAIN:
        report.update({"rank-class": "", "base-round": 0, "digest": ""})
    return RecordDict({"report": report})


def cause_of(content: RecordDict) -> str:
    """Why a reply holds no result, "" where it holds one."""
    record = content.config_records.get("report") or content.config_records.get("capability")
    return str(record["cause"]) if record else "an empty reply"
