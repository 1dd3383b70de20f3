"""What Flower's HTTP grid talks to, in this process: replies as objects, and failures on demand."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, ObjectTree, PullObjectResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    GetNodesResponse,
    PullAppMessagesResponse,
    PushAppMessagesResponse,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.superlink.grid.http_grid import HttpGrid

from flexlora.server.transport.exchange import exchange
from flexlora.server.transport.flower_private import Run, act_as_server, set_message_id
from flexlora.server.transport.pulling import pull
from flexlora.server.transport.retry_queue import PendingMessage, RetryPolicy

RUN, LIMIT = 7, 2**20
CALLS = {
    "PullMessages": "pull_messages",
    "PullObject": "pull_object",
    "ConfirmMessageReceived": "confirm",
    "GetNodes": "get_nodes",
    "PushMessages": "push_messages",
    "PushObject": "push_object",
}


def status(code):
    """The exception of an HTTP status."""
    request = httpx.Request("POST", "http://127.0.0.1/v1/runtime/pull-messages")
    return httpx.HTTPStatusError(str(code), request=request, response=httpx.Response(code))


def written(kind, children=(), body=b""):
    """A Flower object as its bytes, whether or not it makes sense."""
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


class Store:
    """Replies by the id of their message; ``failures`` are raised, one at each call."""

    def __init__(self, nodes=()):
        self.nodes = list(nodes)
        self.objects, self.trees, self.headers = {}, {}, {}
        self.calls, self.asked, self.confirmed, self.failures = [], [], [], []
        self.pushed = {}  # message id -> header, once for each id
        self._client = SimpleNamespace(event_hooks={"request": [], "response": []})

    def _call(self, name):
        self.calls.append(name)
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure

    def reply(self, message, content, *, missing=()):
        """A node's honest reply; objects whose kind is in ``missing`` are not uploaded yet."""
        reply = Message(content, reply_to=message)
        parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        waiting = [name for name, part in parts.items() if part.split(b" ")[0].decode() in missing]
        self.hand_over(message, reply.object_id, get_object_tree(reply), parts)
        self.objects |= dict.fromkeys(waiting, b"")
        return {name: parts[name] for name in waiting}

    def hand_over(self, message, reply_id, tree, parts):
        """Any objects at all as the reply to a message."""
        honest = Message(RecordDict(), reply_to=message)
        header = message_to_proto(remove_content_from_message(honest))
        header.metadata.message_id = reply_id
        self.headers[message.metadata.message_id] = header
        self.trees[reply_id] = tree or ObjectTree(object_id=reply_id)
        self.objects |= parts

    def pull_messages(self, request):
        self.asked.append(list(request.message_ids))
        self._call("poll")
        found = [self.headers.pop(key) for key in request.message_ids if key in self.headers]
        trees = [self.trees[header.metadata.message_id] for header in found]
        return PullAppMessagesResponse(messages_list=found, message_object_trees=trees)

    def pull_object(self, request):
        self._call("object")
        content = self.objects.get(request.object_id)
        size = {"content-length": str(len(content or b"") + 80)}
        for hook in self._client.event_hooks["response"]:
            hook(SimpleNamespace(headers=size, is_success=True))
        return PullObjectResponse(
            object_found=content is not None,
            object_available=bool(content),
            object_content=content or b"",
        )

    def confirm(self, request):
        self._call("confirm")
        self.confirmed.append(request.message_object_id)
        return ConfirmMessageReceivedResponse()

    def get_nodes(self, request):
        self._call("nodes")
        return GetNodesResponse(nodes=[NodeInfo(node_id=node) for node in self.nodes])

    def push_messages(self, request):
        self._call("push")
        ids = [header.metadata.message_id for header in request.messages_list]
        self.pushed |= dict(zip(ids, request.messages_list, strict=True))
        self.push_bytes = request.ByteSize()
        trees = [
            part for tree in request.message_object_trees for part in iterate_object_tree(tree)
        ]
        missing = dict.fromkeys(t.object_id for t in trees if t.object_id not in self.objects)
        return PushAppMessagesResponse(
            message_ids=ids, objects_to_push=list(missing), session_id="s"
        )

    def push_object(self, request):
        self._call("upload")
        assert get_object_id(request.object_content) == request.object_id
        self.objects[request.object_id] = request.object_content
        return SimpleNamespace(stored=True)


def http_grid(store):
    """Flower's grid with its retries, over the store."""
    act_as_server(RUN)
    grid = HttpGrid(token="t")
    grid.set_run(Run.create_empty(run_id=RUN))
    invoker = grid._retry_invoker
    grid.store, grid._client = store, Retrying(store, invoker)
    return grid


class Retrying:
    """The store behind the invoker that Flower's client has around each request."""

    def __init__(self, store, invoker):
        self._store, self._retry_invoker, self._client = store, invoker, store._client

    def __getattr__(self, name):
        if name not in CALLS:
            raise AttributeError(name)
        call = getattr(self._store, CALLS[name])
        return lambda request: self._retry_invoker.invoke(call, request)

    def close(self):
        pass


class Moments:
    """Time that passes while somebody waits."""

    simulated, seconds = False, 0.0

    def now(self):
        return self.seconds

    def wait(self, until):
        self.seconds = min(until, self.seconds + 1.0)

    wait_for_nodes = wait

    def hurry(self):
        pass


def messages(count, most_bytes=LIMIT):
    """Pending messages as if they had been sent: ``m-0``, ``m-1``, ..."""
    found = []
    for k in range(count):
        message = Message(RecordDict(), dst_node_id=10 + k, message_type="train")
        set_message_id(message, f"m-{k}")
        found.append(PendingMessage(message, most_bytes))
        found[-1].mark_sent(f"m-{k}", 0.0)
    return found


def content(size=100, fill=b"x"):
    array = Array("uint8", (size,), "flexlora.raw", fill * size)
    return RecordDict({"report": ConfigRecord({"n": size}), "a": ArrayRecord({"a": array})})


def taken(grid, pending):
    return list(pull(grid, [(p, key) for p in pending for key in p.open]))


def patient_grid(monkeypatch):
    """A grid over an empty ``store``, whose ``clock`` passes while anybody waits."""
    grid = http_grid(Store())
    grid.clock = Moments()

    def sleep(seconds):
        grid.clock.seconds += seconds

    monkeypatch.setattr("flexlora.server.transport.link.time.sleep", sleep)
    return grid


def exchanged_with(grid, pending, *, timeout=60.0, policy=None):
    """What ``exchange`` gives for messages that it pushes under their ids."""

    def push(batch):
        batch = list(batch)
        grid.store._call("push")
        return [message.metadata.message_id for message in batch]

    grid.push_messages = push
    fresh = []
    for p in pending:
        fresh.append(PendingMessage(p.message, p.most_bytes))
    return list(exchange(grid, fresh, timeout=timeout, policy=policy or RetryPolicy()))
