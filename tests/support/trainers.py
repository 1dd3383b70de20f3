"""A resident trainer on a real socket inside the test's process, and messages made by hand."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from federation import small
from flexlora.aggregation import make_method
from flexlora.aggregation.engine.starts import Factoring
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.clients.app import app
from flexlora.clients.trainer.limits import OwnerLimits
from flexlora.clients.trainer.owner_config import OwnerConfig
from flexlora.clients.trainer.reply_store import ReplyStore
from flexlora.clients.trainer.resident import ResidentTrainer
from flexlora.clients.trainer.service import Limits, TrainerService, listen, stop
from flexlora.clients.worker import worker_for
from flexlora.data.clients import client_rows
from flexlora.lora.ranks import RankClass
from flexlora.server.transport.messages import encode_eval_job, encode_train_job, pack

SITE = {"client-id": "site"}


def write_rows(folder, *, rows=12, client=0):
    """A data folder of one client of the built-in tasks."""
    dealt = client_rows(path="", name="", kind="client", num_clients=4, dirichlet_alpha=1.0, seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, held in list(dealt.values())[client].items():
        lines = [
            json.dumps({"instruction": row.instruction, "input": row.input, "output": row.output})
            for row in held[:rows]
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def context_of(config, *, node_id=5, run_id=7, **node_config):
    return Context(
        run_id=run_id,
        node_id=node_id,
        node_config={key.replace("_", "-"): value for key, value in node_config.items()},
        state=RecordDict(),
        run_config=config if isinstance(config, dict) else config.flat(),
    )


def message_of(content, kind, *, server_round=1):
    """A message as a server's strategy makes it; Flower reads its sender from the process."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 0
    return Message(content, dst_node_id=5, message_type=kind, group_id=str(server_round))


def start_of(config, *, method="carried", rank=2, server_round=0):
    """What a server with nothing learned yet sends a client of that rank."""
    shapes = worker_for(config).shapes
    state = State(round=server_round, change=GlobalChange.zero(shapes))
    rank_class = RankClass(name=f"rank_{rank}", rank=rank)
    return make_method(method).start(state, rank_class, Factoring(alpha=16.0, seed=3))


def train_message(config, *, rank=2, server_round=1, method="carried", **job):
    start = start_of(config, rank=rank, method=method)
    payloads = {"trained": pack(start.trained, config.wire.dtype)}
    if start.carried is not None:
        payloads["carried"] = pack(start.carried, "bfloat16")
    content = encode_train_job(start, payloads, server_round=server_round, num_server_rounds=4)
    for key, value in job.items():
        content["job"][key] = value
    return message_of(content, MessageType.TRAIN, server_round=server_round)


def evaluate_message(config, *, ranks=(2, 4), generate=True, server_round=1):
    payloads = {
        f"rank_{rank}": pack(start_of(config, rank=rank).trained, "float32") for rank in ranks
    }
    content = encode_eval_job(payloads, server_round=server_round, generate=generate)
    return message_of(content, MessageType.EVALUATE)


def query_message():
    return message_of(RecordDict(), MessageType.QUERY)


def asked(message, context):
    """The content of the ClientApp's reply to a message."""
    return app(message, context).content


def cause_of(content):
    """Why a reply holds nothing; "" where it holds what was asked for."""
    record = "capability" if "capability" in content else "report"
    return content[record]["cause"]


def values_of(content, *, without=()):
    """Every record of a content as plain values, bytes included."""
    flat: dict[str, Any] = {}
    for name, record in content.items():
        for key, value in record.items():
            if key not in without:
                held = vars(value) if hasattr(value, "stype") else value
                kept = ("dtype", "shape", "stype", "data")
                flat[f"{name}/{key}"] = (
                    {k: held[k] for k in kept} if isinstance(held, dict) else held
                )
    return flat


def run_config(**changes):
    """A tiny run over the whole of one node's data."""
    return small(clients__count=0, lora__dropout=0.1, eval__max_new_tokens=4, **changes)


def content_of(*sizes):
    """Arrays of these sizes whose bytes all differ, and one record of every type of value."""
    arrays = {
        f"array {i}": Array("uint8", (size,), "raw", hashlib.shake_128(bytes([i])).digest(size))
        for i, size in enumerate(sizes)
    }
    values = {
        "flag": True,
        "whole": -(2**62),
        "number": float("nan"),
        "text": "Ä",
        "raw": b"\x00\xff",
        "flags": [True, False],
        "wholes": [1, -2],
        "numbers": [0.1, float("inf")],
        "texts": ["a", ""],
        "raws": [b"", b"x"],
        "none": [],
    }
    return RecordDict(
        {
            "values": ConfigRecord(values),
            "arrays": ArrayRecord(arrays),
            "nothing": ConfigRecord({}),
            "more": ArrayRecord({"last": Array("uint8", (3,), "raw", b"abc")}),
        }
    )


class NodesGrid(Grid):
    """A grid whose nodes answer at once through the ClientApp, each with its own node config."""

    def __init__(self, config, node_configs):
        self.config, self._nodes = config, dict(enumerate(node_configs, start=1))
        self._run, self._replies = Run.create_empty(run_id=7), {}
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 0

    def set_run(self, run):
        self._run = run

    @property
    def run(self):
        return self._run

    def get_node_ids(self):
        return list(self._nodes)

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(f"message-{len(self._replies)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            node_id = message.metadata.dst_node_id
            context = context_of(self.config, node_id=node_id, **self._nodes[node_id])
            self._replies[ids[-1]] = app(message, context)
        return ids

    def pull_messages(self, message_ids):
        replies = [self._replies.get(message_id) for message_id in message_ids]
        self._replies |= dict.fromkeys(message_ids)
        return [reply for reply in replies if reply is not None]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


@dataclass(kw_only=True)
class Resident:
    """A trainer that listens: ``ask`` is what a ClientApp on its node gets back."""

    path: Path
    service: TrainerService
    trainer: ResidentTrainer
    server: Any

    def context(self, config, **changes):
        node = {"trainer_socket": str(self.path), "client_id": "site"}
        return context_of(config, **{**node, **changes})

    def ask(self, message, config, **changes):
        return asked(message, self.context(config, **changes))

    def stop(self, grace=20.0):
        return stop(self.service, self.server, self.path, grace)


def allowed_by(**values):
    """The owner's limits with some changed: ``allowed_by(**{"train.max-steps": 3})``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limits.toml"
        path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        return OwnerLimits.read(path)


@contextmanager
def resident(
    data,
    state,
    *,
    limits=None,
    allowed=None,
    client_id="",
    limit_bytes=0,
    keep_bytes=10**8,
    group="",
    name="s",
):
    """A trainer of the embedded base over ``data``, its replies kept in ``state``.

    ``allowed`` are the owner's limits, by dotted key or as a whole.
    """
    node = OwnerConfig.of(
        model="embedded", data=str(data), client_id=client_id, sets=("engine.threads=1",)
    )
    # A path of a test's own folder may be too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="flx-"))
    kept = ReplyStore(Path(state), max_bytes=keep_bytes, max_seconds=3600.0)
    allowed = allowed_by(**allowed or {}) if not isinstance(allowed, OwnerLimits) else allowed
    trainer = ResidentTrainer(owner=node, replies=kept, limits=allowed, limit_bytes=limit_bytes)
    service = TrainerService(trainer, limits=limits or Limits(wait_seconds=30.0))
    server = listen(service, folder / name, group)
    server.start()
    made = Resident(path=folder / name, service=service, trainer=trainer, server=server)
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder)
