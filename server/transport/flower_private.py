"""Flower's names that are not in its documented API, as the server and the simulations use them.

``tests/server/test_server_flower_private.py`` checks each one as it is used here. When Flower
moves:

    ErrorCode           the numbers 0, 3, 4, 5 and 8, and that a lost node or message still gets one
    ObjectPushError     what ``Grid.push_messages`` raises when an upload of records breaks off
    Run                 ``Run.create_empty(run_id=...)``, which a ``Grid`` of one's own must return
    TaskIdentity        ``Message(...)`` reads its sender from these three class attributes
    ProtobufClient      base of every HTTP client of Flower's; ``_send`` sends one request
                        (``flexlora/deploy/request_watch.py``)
    flower_superlink, flower_superexec
                        the programs of these names, as functions without arguments
    SQLITE_PRAGMAS      what ``sql_mixin`` sets on every connection to a SuperLink's database;
                        ``busy_timeout`` in milliseconds, before SQLite says "database is locked"
    Control*Middleware  of the SuperLink: a request whose path does not begin with
                        ``/v1/control/`` passes them unchanged
    FleetEventLogMiddleware, RuntimeTracingMiddleware
                        pass everything unchanged where the app's state has no
                        ``fleet_event_log_plugin``, and without ``FLWR_TRACING_ENABLED=1``
    fleet_handlers      ``check_abort(run_id, statuses, state)``, with the same statuses at every
                        request of a node about a run: why the run takes none, or None
    Metadata            keeps ``_message_id``, ``_src_node_id`` and ``_reply_to_message_id`` in its
                        ``__dict__`` under these names
    HttpGrid            ``_client``, which ``_runtime_client`` gives and makes where it is None,
                        with the calls below, a ``_retry_invoker`` (with ``max_tries``) and an httpx
                        client as its own ``_client``; and ``node``
    PullMessages        hands each reply over once, with the tree of its objects
    PullObject          found and available, found and not uploaded yet, or not found
    objects             ``TYPE CHILD,CHILD LENGTH``, a zero byte, the body; an ``Array``'s body is
                        JSON with ``arraychunk_ids``, places in its list of children
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_object_head_values_from_object_content as object_head,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    inflate_object_from_contents,
)
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "EXPIRED_CODES",
    "LOST",
    "LOST_CODES",
    "MOST_OBJECTS",
    "NODE_UNAVAILABLE",
    "UNREADABLE",
    "Handed",
    "ObjectGone",
    "ObjectPushError",
    "ObjectTooLarge",
    "ProtobufClient",
    "Run",
    "act_as_server",
    "confirm",
    "error_reply",
    "inflate_object_from_contents",
    "is_outage",
    "object_head",
    "outermost_middleware",
    "poll",
    "program",
    "pull_object",
    "pulls_by_itself",
    "remember_running",
    "set_message_id",
    "set_sender",
    "skip_idle_middleware",
    "tried_once",
    "wait_for_database",
]

UNREADABLE: int = ErrorCode.UNKNOWN  # our own, for a reply that cannot be read
LOST: int = ErrorCode.REPLY_MESSAGE_UNAVAILABLE
NODE_UNAVAILABLE: int = ErrorCode.NODE_UNAVAILABLE
EXPIRED_CODES = frozenset({ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE})
# All other codes are the client's own failure, which a second copy would only repeat.
LOST_CODES = EXPIRED_CODES | {ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED}

# A SuperNode waits 30 s for an answer; Flower's own 5 s are short where many nodes write.
DATABASE_SECONDS = 20
RUNNING_SECONDS = 1.0
CONTROL_MIDDLEWARE = (
    "ControlSensitiveResponseMiddleware",
    "ControlAuthenticationMiddleware",
    "ControlLicenseMiddleware",
    "ControlEventLogMiddleware",
)


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


def skip_idle_middleware() -> None:
    """Spare the requests to a SuperLink in this process the layers that would not look at them.

    An empty poll passes nine of them; without six it takes a quarter to a third less processor time
    (``docs/log.md``).
    """
    from flwr.supercore.routers.runtime import tracing
    from flwr.superlink.routers.control import middlewares as control
    from flwr.superlink.routers.fleet import middlewares as fleet

    def not_control(scope: Any) -> bool:
        return not scope["path"].startswith("/v1/control/")

    def not_logged(scope: Any) -> bool:
        return getattr(scope["app"].state, "fleet_event_log_plugin", None) is None

    def not_traced(scope: Any) -> bool:
        return os.environ.get("FLWR_TRACING_ENABLED") != "1"

    for name in CONTROL_MIDDLEWARE:
        _spare(getattr(control, name), not_control)
    _spare(fleet.FleetEventLogMiddleware, not_logged)
    _spare(tracing.RuntimeTracingMiddleware, not_traced)


def remember_running() -> None:
    """Believe for ``RUNNING_SECONDS`` that a run goes on, where nodes' requests are about it.

    A SuperLink in this process looks it up at each of them: a tenth of its time.
    """
    from flwr.superlink.servicer.fleet import fleet_handlers

    check, running = fleet_handlers.check_abort, dict[int, float]()

    def remembered(run_id: int, statuses: list[str], state: Any) -> str | None:
        now = time.monotonic()
        if now < running.get(run_id, 0.0):
            return None
        why = check(run_id, statuses, state)
        if why is None:
            running[run_id] = now + RUNNING_SECONDS
        return why

    vars(fleet_handlers)["check_abort"] = remembered


def outermost_middleware() -> Any:
    """The class of the layer that every request to a SuperLink in this process meets first."""
    from flwr.superlink.routers.control.middlewares import ControlSensitiveResponseMiddleware

    return ControlSensitiveResponseMiddleware


def _spare(kind: Any, idle: Callable[[Any], bool]) -> None:
    """Have the middleware ``kind`` hand on the HTTP requests for which it is ``idle``."""
    layer = kind.__call__

    async def call(self: Any, scope: Any, receive: Any, send: Any) -> None:
        passes = scope["type"] == "http" and idle(scope)
        await (self.app if passes else partial(layer, self))(scope, receive, send)

    kind.__call__ = call


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


BUSY = (408, 425, 429)  # statuses below 500 that ask to come again
MOST_OBJECTS = 4096  # of one reply: 20 GB of factors have as many
ANSWER_BYTES = 4096  # of a PullObject response beside its object


class ObjectGone(Exception):
    """The SuperLink does not have the object: its upload broke off and has expired."""


class ObjectTooLarge(Exception):
    """An object is larger than what is left of its reply's limit; its bytes were not read."""

    def __init__(self, size: int) -> None:
        super().__init__(f"an object of {size:,} bytes")
        self.size = size


@dataclass(kw_only=True)
class Handed:
    """A reply that the SuperLink has handed over; its objects stay there until ``confirm``.

    ``objects`` has the reply's own id first, and one more than ``MOST_OBJECTS`` where there are too
    many. ``whole`` is the reply itself where nothing is to be pulled. While its node still uploads
    it, it is looked at again at ``next_look``, ``pause`` seconds after the last time.
    """

    answers: str  # id of the message
    reply_id: str
    objects: tuple[str, ...] = ()
    whole: Message | None = None
    next_look: float = 0.0
    pause: float = 0.25


def _http_grid(grid: Any) -> Any:
    """Flower's class ``HttpGrid`` if the grid is one.

    Its module, which takes 1.5 s to load, is loaded then.
    """
    module = sys.modules.get("flwr.superlink.grid.http_grid")
    return module.HttpGrid if module is not None and isinstance(grid, module.HttpGrid) else None


def pulls_by_itself(grid: Grid) -> bool:
    """Whether replies come over Flower's HTTP client; another grid has its ``pull_messages``."""
    kind = _http_grid(grid)
    return kind is not None and type(grid).pull_messages is kind.pull_messages


@contextmanager
def tried_once(grid: Any) -> Iterator[None]:
    """Let Flower's client raise at the first failure, where it repeats some without end.

    The grid has another client meanwhile, on the same connections: the one that Flower's threads
    for heartbeats and logs hold goes on repeating.
    """
    if _http_grid(grid) is None:
        yield
        return
    patient: Any = grid._runtime_client
    hasty = copy(patient)
    hasty._retry_invoker = copy(patient._retry_invoker)
    hasty._retry_invoker.max_tries = 1
    grid._client = hasty
    try:
        yield
    finally:
        if grid._client is hasty:
            grid._client = patient


def is_outage(error: Exception) -> bool:
    """Whether a call failed since the SuperLink or the way to it did, so that it may be repeated.

    A response that protobuf cannot read is a plain ``ValueError`` of Flower's client.
    """
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in BUSY or error.response.status_code >= 500
    damaged = type(error) is ValueError and "protobuf response" in str(error)
    return damaged or isinstance(error, httpx.TransportError)


def poll(grid: Any, message_ids: Sequence[str]) -> list[Handed]:
    """The replies to any of the messages that have come; each is handed over once."""
    response = grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
    return [
        Handed(
            answers=header.metadata.reply_to_message_id,
            reply_id=header.metadata.message_id,
            objects=_object_ids(tree),
            whole=message_from_proto(header) if header.HasField("error") else None,
        )
        for header, tree in zip(response.messages_list, response.message_object_trees, strict=True)
    ]


def _object_ids(tree: ObjectTree) -> tuple[str, ...]:
    """The ids in a tree, each once, parents before their children."""
    found: dict[str, None] = {}
    waiting = [tree]
    while waiting and len(found) <= MOST_OBJECTS:
        node = waiting.pop()
        found[node.object_id] = None
        waiting.extend(node.children)
    return tuple(found)


def pull_object(grid: Any, object_id: str, most_bytes: int) -> bytes | None:
    """The object's bytes; None where it is not uploaded yet.

    Raises:
        ObjectGone: the SuperLink does not have it.
        ObjectTooLarge: it has more than ``most_bytes``, by the header of the response.
    """

    def check(response: httpx.Response) -> None:
        size = int(response.headers.get("content-length", 0))
        if response.is_success and size > most_bytes + ANSWER_BYTES:
            raise ObjectTooLarge(size)

    client, run_id = grid._runtime_client, grid.run.run_id
    request = PullObjectRequest(node=grid.node, run_id=run_id, object_id=object_id)
    hooks = client._client.event_hooks
    client._client.event_hooks = {**hooks, "response": [*hooks["response"], check]}
    try:
        response = client.PullObject(request)
    finally:
        client._client.event_hooks = hooks
    if not response.object_found:
        raise ObjectGone("the upload of the reply broke off")
    return response.object_content if response.object_available else None


def confirm(grid: Any, reply_id: str) -> None:
    """Let the SuperLink drop a reply; it is dropped with the run otherwise."""
    run_id = grid.run.run_id
    request = ConfirmMessageReceivedRequest(
        node=grid.node, run_id=run_id, message_object_id=reply_id
    )
    with suppress(httpx.HTTPError):
        grid._runtime_client.ConfirmMessageReceived(request)


def error_reply(message: Metadata, code: int, reason: str) -> Message:
    """A reply in the place of one that could not be read, to the message of this metadata."""
    metadata = Metadata(
        run_id=message.run_id,
        message_id="",
        src_node_id=message.dst_node_id,
        dst_node_id=message.src_node_id,
        reply_to_message_id=message.message_id,
        group_id=message.group_id,
        created_at=message.created_at,
        ttl=message.ttl,
        message_type=message.message_type,
    )
    return make_message(metadata=metadata, error=Error(code=code, reason=reason))
