"""The Flower ClientApp: pass a message's content to the node's trainer and return the reply.

With ``trainer-socket`` in the node config (or FLEXLORA_TRAINER_SOCKET) the resident trainer
answers, and this process, which Flower starts anew for every message, loads no torch. Otherwise
this process loads the base and answers, as in simulations and notebooks. A trainer that does not
answer is a failure: the ClientApp never falls back to loading the data itself.
"""

from __future__ import annotations

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flexlora.clients.failure_reply import reply_of
from flexlora.clients.trainer.sockets import trainer_socket
from flexlora.config.cores import wait_passively

__all__ = ["app"]

app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
def reply(message: Message, context: Context) -> Message:
    """This node's reply; an exception becomes a reply with its cause."""
    try:
        content = _answer(message, context)
    except Exception as error:
        name = str(context.node_config.get("client-id", f"node_{context.node_id}"))
        content = reply_of(message.metadata.message_type, name, error)
    return Message(content, reply_to=message)


def _answer(message: Message, context: Context) -> RecordDict:
    socket = trainer_socket(context.node_config)
    if socket is None:
        wait_passively()
        from flexlora.clients.handler import answer_here  # loads torch

        return answer_here(message, context)
    from flexlora.clients.trainer.client import ask

    return ask(socket, message, context)
