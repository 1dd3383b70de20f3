"""The Flower ClientApp: hands a message's content to whoever works on this node, returns the reply.

Where a resident trainer runs (``trainer-socket`` in the node config, or FLEXLORA_TRAINER_SOCKET),
that is the trainer, and this process, which Flower starts anew for every message, loads no torch.
Elsewhere, in simulation and in notebooks, it is this process itself. A node whose trainer cannot
be reached says so: it never falls back to loading data that the trainer was to keep for itself.
"""

from __future__ import annotations

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flexlora.clients.trainer.failures import failure
from flexlora.clients.trainer.sockets import socket_of
from flexlora.errors import one_line

__all__ = ["app"]

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who is this node, and what can it train?"""
    return _reply(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train this client's factors from what the message brings."""
    return _reply(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the adapters in the message on this client's held-out rows."""
    return _reply(message, context)


def _reply(message: Message, context: Context) -> Message:
    """The answer of this node; a failure becomes a reply that says why."""
    try:
        content = _answer(message, context)
    except Exception as error:
        name = str(context.node_config.get("client-id", f"node_{context.node_id}"))
        content = failure(message.metadata.message_type, name, one_line(error))
    return Message(content, reply_to=message)


def _answer(message: Message, context: Context) -> RecordDict:
    socket = socket_of(context.node_config)
    if socket is None:
        from flexlora.clients.trainer.in_process import answer_here  # loads torch

        return answer_here(message, context)
    from flexlora.clients.trainer.client import ask

    return ask(socket, message, context)
