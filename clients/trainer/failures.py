"""Replies of a node that could not do what it was asked, made without torch.

``encode_train`` and its kin (``messages.py``) need the library, which loads torch; a ClientApp
whose trainer is not there has nothing to encode but a cause.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, MessageType, RecordDict

__all__ = ["failure"]


def failure(message_type: str, client_id: str, cause: str) -> RecordDict:
    """What a client that cannot say more answers: who it is, and why there is nothing."""
    if message_type == MessageType.QUERY:
        return RecordDict({"capability": ConfigRecord({"client-id": client_id, "cause": cause})})
    report: dict[str, str | int] = {"client-id": client_id, "cause": cause}
    if message_type == MessageType.TRAIN:
        report |= {"rank-class": "", "base-round": 0, "digest": ""}
    return RecordDict({"report": ConfigRecord(report)})
