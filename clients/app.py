"""The Flower ClientApp: decodes a message, lets the worker answer, encodes the reply.

``flwr run .`` starts it on every node. A failure becomes a reply that says why.
"""

from __future__ import annotations

from flexlora.clients.messages import (
    decode_evaluate,
    decode_train,
    encode_capability,
    encode_evaluate,
    encode_train,
)
from flexlora.clients.worker import Worker, failed_training, worker_for
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flexlora.config import Config
from flexlora.errors import UserError, told
from flexlora.jobs import Capability, EvalResult, TrainResult

__all__ = ["app"]

app = ClientApp()


def _worker(context: Context) -> tuple[Worker, str]:
    """This node's worker and the client it is.

    In simulation ``partition-id`` names the client. A node with its own ``data-path`` (and
    ``model-path``) in its node config is one client, named by ``client-id``; ``quantization`` says
    how it holds its base.
    """
    config, node = Config(context.run_config), context.node_config
    if "model-path" in node:
        config = Config({**config, "model.name": str(node["model-path"])})
    if "quantization" in node:
        own = {"model.quantization": str(node["quantization"]), "clients.quantization": ""}
        config = Config({**config, **own})
    if "data-path" in node:
        name = str(node.get("client-id", f"node_{context.node_id}"))
        own = {"data.path": str(node["data-path"]), "data.name": "", "data.partition": "iid"}
        alone = {"clients.count": 1, "clients.quantization": ""}
        config = Config({**config, **own, **alone})
        worker = worker_for(config)
        worker.data.rename(name)
        return worker, name
    if "partition-id" not in node:
        raise UserError(
            "the node has neither data-path nor partition-id in its node config; "
            'start it with --node-config \'data-path="..." client-id="..."\'.'
        )
    worker = worker_for(config)
    partition = int(node["partition-id"])
    client_id = worker.client_at(partition)
    if client_id is None:
        known = len(worker.client_ids)
        raise UserError(f"partition {partition} has no client: the data makes {known} clients.")
    return worker, client_id


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who is this node, and what can it train?"""
    try:
        worker, client_id = _worker(context)
        capability = worker.capability(client_id)
    except Exception as error:
        capability = Capability.failed(f"node_{context.node_id}", told(error))
    return encode_capability(capability, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train this client's factors from what the message brings."""
    dtype = str(context.run_config["wire.dtype"])
    try:
        worker, client_id = _worker(context)
        job = decode_train(message, client_id)
    except Exception as error:
        result = TrainResult.failed(f"node_{context.node_id}", told(error))
        return encode_train(result, dtype=dtype, reply_to=message)
    try:
        result = worker.train([job])[0]
    except Exception as error:
        result = failed_training(job, told(error))
    trainable = job.start.trainable
    return encode_train(result, dtype=dtype, reply_to=message, trainable=trainable)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the adapters in the message on this client's held-out rows."""
    try:
        worker, client_id = _worker(context)
        result = worker.evaluate([decode_evaluate(message, client_id)])[0]
    except Exception as error:
        result = EvalResult(client_id=f"node_{context.node_id}", cause=told(error))
    return encode_evaluate(result, reply_to=message)
