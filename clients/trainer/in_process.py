"""A ClientApp without a trainer: its own process loads the base and does the work."""

from __future__ import annotations

from flwr.app import Context, Message, RecordDict

from flexlora.clients.trainer.answers import answer
from flexlora.clients.trainer.node import ALONE
from flexlora.clients.worker import Worker, worker_for
from flexlora.config.resolve import Config, of_flower
from flexlora.errors import UserError

__all__ = ["answer_here", "worker_of"]


def answer_here(message: Message, context: Context) -> RecordDict:
    """What this process answers to a message.

    Raises:
        UserError: a node that is no client, or a base or data that cannot be had.
    """
    worker, client_id = worker_of(context)
    return answer(message.metadata.message_type, message.content, worker, client_id)


def worker_of(context: Context) -> tuple[Worker, str]:
    """This node's worker and the client it is.

    In simulation ``partition-id`` names the client. A node with its own ``data-path`` (and
    ``model-path``) in its node config is one client, named by ``client-id``; ``quantization`` says
    how it holds its base.
    """
    config, node = Config.of(of_flower(context.run_config)), context.node_config
    if "model-path" in node:
        config = config.with_values({"model.name": str(node["model-path"])})
    if "quantization" in node:
        own = {"model.quantization": str(node["quantization"]), "clients.quantization": ""}
        config = config.with_values(own)
    if "data-path" in node:
        name = str(node.get("client-id", f"node_{context.node_id}"))
        worker = worker_for(config.with_values({"data.path": str(node["data-path"]), **ALONE}))
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
