"""A Flower ServerApp that sends every client its factors and collects what comes back.

Flower cannot average unequal ranks (it adds them by broadcasting, without an error), so the peer
does not aggregate at all: that is in its favour. Stock sampling draws node ids anew in every run;
here every node trains in every round.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from flexlora.simulations.benchmarks.cohort_peers.work import (
    Stamps,
    Training,
    Work,
    what_came_back,
    write_report,
)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds, then the report."""
    work = Work.read(str(context.run_config["work"]))
    nodes = _clients_of_nodes(grid, len(work.clients))
    arrays = {rank: ArrayRecord(work.start(rank)) for rank in set(work.ranks.values())}
    trainings: list[Training] = []
    replies: list[Message] = []
    stamps = Stamps()
    stamps.mark()
    for server_round in range(1, work.num_rounds + 1):
        messages = []
        for node, client_id in nodes.items():
            config = ConfigRecord({"client-id": client_id, "server-round": server_round})
            content = RecordDict({"arrays": arrays[work.ranks[client_id]], "config": config})
            messages.append(Message(content, node, MessageType.TRAIN))
        replies = _good(grid.send_and_receive(messages))
        trainings += [_training(reply) for reply in replies]
        stamps.mark()
    arrived = {_name(reply): reply.content.array_records["arrays"] for reply in replies}
    states = {name: record.to_torch_state_dict() for name, record in arrived.items()}
    write_report(
        str(context.run_config["report"]), stamps, trainings, **what_came_back(work, states)
    )


def _clients_of_nodes(grid: Grid, count: int) -> dict[int, str]:
    """Which client each node is, once all of them are there."""
    while len(nodes := list(grid.get_node_ids())) < count:
        time.sleep(0.1)
    queries = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    return {
        reply.metadata.src_node_id: str(reply.content["client"]["client-id"])
        for reply in _good(grid.send_and_receive(queries))
    }


def _good(replies: Iterable[Message]) -> list[Message]:
    replies = list(replies)
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"a client failed: {reply.error.reason}")
    return replies


def _name(reply: Message) -> str:
    return str(reply.content["config"]["client-id"])


def _training(reply: Message) -> Training:
    metrics: Any = reply.content["metrics"]
    config: Any = reply.content["config"]
    return Training(
        server_round=int(config["server-round"]),
        client_id=_name(reply),
        steps=int(metrics["steps"]),
        tokens=int(metrics["tokens"]),
        loss=float(metrics["loss"]),
    )
