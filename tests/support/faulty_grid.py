"""A Flower grid whose faults are written down: what becomes of every copy of every message.

The server's side is the product's. A client is a function: it decodes what it was sent as a node
would, and "trains" by noise that its name and round give. Time is a number that passes while the
server waits, so that minutes of silence cost nothing. What is not known to the SuperLink (a message
that has been answered, or has expired) is answered as Flower 1.41 does, with code 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from flwr.app import Error, Message, MessageType
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

import flexlora
from flexlora.clients.failure_reply import failure_reply
from flexlora.clients.messages import (
    decode_train_job,
    encode_capability,
    encode_evaluate_result,
    encode_train_result,
)
from flexlora.config.resolve import Config
from flexlora.seeds import derive_seed
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.wire.jobs import Capability, EvalResult, TrainResult
from flexlora.wire.packing import WIRE_VERSION
from one_round import SHAPES, noisy
from spelled import of_names

SUPERLINK = 1
SETTINGS = {
    "method.name": "residual",
    "num-server-rounds": 2,
    "fraction-train": 1.0,
    "ranks.tiers": "2,4",
    "ranks.shares": "equal",
    "wire.dtype": "float64",
    "eval.every": 0,
    "server.round-timeout-seconds": 100.0,
    "server.silence-seconds": 40.0,
    "server.wait-seconds": 60.0,
}


def settings(**changes):
    """``SETTINGS`` for the server, changed; keyword names spell ``.`` as ``__``, ``-`` as ``_``."""
    return Config.of(SETTINGS).with_values(of_names(**changes))


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What becomes of one copy: a reply after ``seconds``, Flower's error ``code``, or silence.

    With ``passing`` the reply is a failure that the node says will pass.
    """

    seconds: float = 1.0
    code: int = 0
    silent: bool = False
    passing: str = ""


REPLY, SILENT = Fate(), Fate(silent=True)


def lost(code, seconds=1.0):
    return Fate(code=code, seconds=seconds)


class Moments:
    """A clock that is nobody's: it passes while somebody waits."""

    simulated = False

    def __init__(self):
        self.seconds = 0.0

    def now(self):
        return self.seconds

    def wait(self, until):
        self.seconds = max(min(until, self.seconds + 0.5), math.nextafter(self.seconds, math.inf))

    def hurry(self):
        pass

    def wait_for_nodes(self, until):
        self.wait(until)

    def set(self, seconds):
        self.seconds = seconds

    def spent(self, client_id):
        return None

    def downloaded(self, client_id):
        return 1.0


def capability(client_id, num_examples=10, **changes):
    names = tuple(SHAPES)
    own = Capability(
        client_id=client_id,
        num_examples=num_examples,
        version=flexlora.__version__,
        wire_version=WIRE_VERSION,
        fingerprint="f" * 32,
        quantization="none",
        device="cpu",
        modules=names,
        out_features=tuple(SHAPES[name][0] for name in names),
        in_features=tuple(SHAPES[name][1] for name in names),
    )
    return replace(own, **changes)


class FaultyGrid(Grid):
    """Nodes by id, each with its client; ``fates`` by (round, client): one of each copy in turn.

    Those of questions stand under ("query", client). ``later`` holds nodes that start at a time.
    ``away`` holds the times at which a node is not there: ``{node id: [(from, to), ...]}``. After
    the last fate of a client's row, copies are answered at once.
    """

    def __init__(self, clients, fates=None, *, away=None, reports=None, later=None):
        self.clients, self.clock = dict(clients), Moments()
        self.fates, self.away = dict(fates or {}), dict(away or {})
        self.later = dict(later or {})  # node id: when it starts, and its client
        self.reports = dict(reports or {})  # client id: what it says of itself instead
        self.pushed = []  # (kind, round, client, time, node, ttl), in order
        self.results = {}  # (round, client): what it trained
        self._open, self._run = {}, Run.create_empty(run_id=1)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0

    def set_run(self, run):
        self._run = run

    @property
    def run(self):
        return self._run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def is_away(self, node):
        spans = self.away.get(node, ())
        return any(first <= self.clock.now() < last for first, last in spans)

    def get_node_ids(self):
        for node, (starts, client_id) in self.later.items():
            if self.clock.now() >= starts:
                self.clients[node] = client_id
        return [node for node in self.clients if not self.is_away(node)]

    def copies(self, server_round, client_id):
        """When each copy of a train message went out."""
        key = ("train", server_round, client_id)
        return [sent[3] for sent in self.pushed if sent[:3] == key]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            metadata = message.metadata
            client_id = self.clients.get(metadata.dst_node_id)
            if client_id is None:
                ids.append(None)
                continue
            server_round = int(metadata.group_id or 0)
            fate = Fate(seconds=0.0)
            kind = metadata.message_type
            if kind == MessageType.TRAIN:
                fates = self.fates.get((server_round, client_id), [])
                copies = len(self.copies(server_round, client_id))
                fate = fates[copies] if copies < len(fates) else REPLY
            elif kind == MessageType.QUERY:
                fates = self.fates.get(("query", client_id), [])
                fate = fates.pop(0) if fates else fate
            now = self.clock.now()
            sent = (kind, server_round, client_id, now, metadata.dst_node_id)
            self.pushed.append((*sent, metadata.ttl))
            ids.append(f"message-{len(self.pushed)}")
            metadata.__dict__["_message_id"] = ids[-1]
            self._open[ids[-1]] = message, fate, now
        return ids

    def pull_messages(self, message_ids):
        return [reply for key in list(message_ids) for reply in self._pull(key)]

    def _pull(self, message_id):
        if message_id not in self._open:
            raise AssertionError(f"{message_id} was answered before, or never sent")
        message, fate, sent_at = self._open[message_id]
        if self.is_away(message.metadata.dst_node_id):
            fate = lost(5)
        elif fate.silent or self.clock.now() < sent_at + fate.seconds:
            return []
        del self._open[message_id]
        if fate.code:
            reply = Message(Error(code=fate.code, reason="as written"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK
            return [reply]
        if fate.passing:
            kind, client_id = (
                message.metadata.message_type,
                self.clients[message.metadata.dst_node_id],
            )
            content = failure_reply(kind, client_id, fate.passing, transient=True)
            return [Message(content, reply_to=message)]
        return [self.answer(message)]

    def answer(self, message):
        """What the client of this node replies."""
        client_id, kind = self.clients[message.metadata.dst_node_id], message.metadata.message_type
        if kind == MessageType.QUERY:
            report = self.reports.get(client_id) or capability(client_id)
            return Message(encode_capability(report), reply_to=message)
        if kind == MessageType.EVALUATE:
            return Message(
                encode_evaluate_result(EvalResult(client_id=client_id)), reply_to=message
            )
        job = decode_train_job(message.content, client_id)
        start = job.start.for_client(client_id)
        seed = derive_seed(0, client_id, job.server_round) % 10_000
        result = TrainResult(
            client_id=client_id,
            rank_class=start.rank_class.name,
            base_round=start.base_round,
            digest=start.digest,
            num_examples=1 + seed % 9,
            adapter=noisy(start.trained, start.trainable, seed),
            train_loss=1.0,
        )
        self.results[job.server_round, client_id] = result
        return Message(encode_train_result(result, dtype="float64", start=start), reply_to=message)


class Told:
    """An observer that records its calls."""

    def __init__(self):
        self.events = []

    def __getattr__(self, event):
        if event.startswith("_"):
            raise AttributeError(event)
        return lambda *args: self.events.append((event, *args))

    def of(self, event):
        return [args for name, *args in self.events if name == event]


def people(count, first_node=10):
    return {first_node + k: f"client_{k}" for k in range(count)}


def run(grid, config=None, *, rows=None, **options):
    """A run over ``grid``: the strategy, and the rows of ``clients.csv`` appended to ``rows``."""
    strategy = FlexLoRAStrategy(config or settings(), **options)
    close = strategy._close_round

    def closed(metrics, clock):
        if rows is not None:
            rows.extend({**row.cells(), "metrics": metrics} for row in strategy.metrics.rows)
        close(metrics, clock)

    strategy._close_round = closed
    strategy.start(grid)
    return strategy
