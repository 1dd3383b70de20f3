"""A Flower ClientApp that trains with PEFT, as FlowerTune's does.

With ``cache`` off the model is read for every message. With ``cache`` on a process reads it once:
this module is imported by its name in every one of Ray's processes, so what it keeps stays there (a
global of ``__main__`` would be pickled with the app and come anew with every message). The rows are
kept either way.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flexlora.simulations.benchmarks.cohort_peers.peft_client import load_model, train_client
from flexlora.simulations.benchmarks.cohort_peers.work import Work

app = ClientApp()


@cache
def _work(folder: str) -> Work:
    return Work.read(folder)


@cache
def _kept_model(folder: str) -> Any:
    work = _work(folder)
    return load_model(work, work.ranks.values())


@app.query()
def query(message: Message, context: Context) -> Message:
    """Which client this node is: the server has to know its rank."""
    partition = int(context.node_config["partition-id"])
    client = ConfigRecord({"client-id": _work(_folder(context)).clients[partition]})
    return Message(RecordDict({"client": client}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train from the factors in the message and send them back."""
    torch.set_num_threads(1)
    folder, config = _folder(context), message.content.config_records["config"]
    server_round: Any = config["server-round"]
    work, client_id = _work(folder), str(config["client-id"])
    if context.run_config["cache"]:
        model = _kept_model(folder)
    else:
        model = load_model(work, [work.ranks[client_id]])
    start = message.content.array_records["arrays"].to_torch_state_dict()
    state, done = train_client(model, work, int(server_round), client_id, start)
    metrics = MetricRecord({"loss": done.loss, "steps": done.steps, "tokens": done.tokens})
    content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics, "config": config})
    return Message(content, reply_to=message)


def _folder(context: Context) -> str:
    return str(context.run_config["work"])
