"""Flower's names that are not in its documented API, as the server and the simulations use them.

``tests/server/test_server_flower_private.py`` checks each one as it is used here. When Flower
moves:

    ErrorCode           the numbers 3, 4, 5 and 8, and that a lost node or message still gets one
    ObjectPushError     what ``Grid.push_messages`` raises when an upload of records breaks off
    Run                 ``Run.create_empty(run_id=...)``, which a ``Grid`` of one's own must return
    TaskIdentity        ``Message(...)`` reads its sender from these three class attributes
    ProtobufClient      base of every HTTP client of Flower's; ``_send`` sends one request
                        (``flexlora/deploy/request_watch.py``)
    flower_superlink, flower_superexec
                        the programs of these names, as functions without arguments
    SQLITE_PRAGMAS      what ``sql_mixin`` sets on every connection to a SuperLink's database;
                        ``busy_timeout`` in milliseconds, before SQLite says "database is locked"
    Metadata            keeps ``_message_id``, ``_src_node_id`` and ``_reply_to_message_id`` in its
                        ``__dict__`` under these names
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "EXPIRED_CODES",
    "LOST_CODES",
    "NODE_UNAVAILABLE",
    "ObjectPushError",
    "ProtobufClient",
    "Run",
    "act_as_server",
    "program",
    "set_message_id",
    "set_sender",
    "wait_for_database",
]

NODE_UNAVAILABLE: int = ErrorCode.NODE_UNAVAILABLE
EXPIRED_CODES = frozenset({ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE})
# All other codes are the client's own failure, which a second copy would only repeat.
LOST_CODES = EXPIRED_CODES | {ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED}

# A SuperNode waits 30 s for an answer; Flower's own 5 s are short where many nodes write.
DATABASE_SECONDS = 20


def program(name: str) -> Callable[[], object]:
    """``flower-superlink`` or ``flower-superexec``, which load what no ServerApp needs."""
    if name == "flower-superlink":
        from flwr.superlink.cli import flower_superlink

        return flower_superlink
    from flwr.supercore.cli import flower_superexec

    return flower_superexec


def wait_for_database() -> None:
    """Have this process wait ``DATABASE_SECONDS`` for a lock on the SuperLink's database."""
    from flwr.supercore import sql_mixin

    others = [pair for pair in sql_mixin.SQLITE_PRAGMAS if pair[0] != "busy_timeout"]
    longer = ("busy_timeout", str(1000 * DATABASE_SECONDS))
    vars(sql_mixin)["SQLITE_PRAGMAS"] = (longer, *others)


def act_as_server(run_id: int) -> None:
    """Make messages of this process come from the ServerApp of ``run_id`` (task 1, node 0)."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, 0


def set_message_id(message: Message, message_id: str) -> None:
    """The id that Flower's own grid gives a message when it is pushed."""
    message.metadata.__dict__["_message_id"] = message_id


def set_sender(reply: Message, node_id: int, reply_to_message_id: str | None = None) -> None:
    """A reply's sender and the message it answers: Flower's error replies name the SuperLink."""
    reply.metadata.__dict__["_src_node_id"] = node_id
    if reply_to_message_id is not None:
        reply.metadata.__dict__["_reply_to_message_id"] = reply_to_message_id
