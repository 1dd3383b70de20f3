"""The ClientApp's side of the trainer's socket: send a content, read the reply, without torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from flwr.app import Context, Message, MessageType, RecordDict

import flexlora
from flexlora.clients.failure_reply import Transient
from flexlora.clients.trainer.content_codec import (
    PART_BYTES,
    ContentRefused,
    array_parts,
    decode_content,
    encode_entries,
    encode_header,
)
from flexlora.clients.trainer.sockets import connection_error
from flexlora.clients.trainer.trainer_pb2 import Answer, Call, HealthReply, HealthRequest, Question
from flexlora.clients.trainer.trainer_pb2_grpc import TrainerStub
from flexlora.errors import UserError

__all__ = ["ask", "call_of", "health"]

HEALTH_SECONDS = 10.0
# A trainer that is started again loads its base; to a query, for which a run's start waits, the
# answer comes sooner.
PATIENCE_SECONDS = {MessageType.QUERY: 20.0, MessageType.TRAIN: 120.0, MessageType.EVALUATE: 120.0}
PAUSE_SECONDS = 0.5
# What passes by itself: the trainer ended, has other work, did not get the bytes.
PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
    }
)
_METHODS = {
    MessageType.QUERY: "Capability",
    MessageType.TRAIN: "Train",
    MessageType.EVALUATE: "Evaluate",
}


def ask(path: Path, message: Message, context: Context) -> RecordDict:
    """The content of the trainer's reply to a message; waits for a trainer that is not there.

    Raises:
        Transient: no trainer on ``path`` in time, one that is busy, or one that ended meanwhile.
        UserError: a trainer that refuses.
    """
    content = message.content
    deadline = time.monotonic() + PATIENCE_SECONDS[message.metadata.message_type]
    while connection_error(path) and time.monotonic() < deadline:
        time.sleep(PAUSE_SECONDS)
    call = call_of(message, context)
    with trainer_on(path) as stub:
        method = getattr(stub, _METHODS[message.metadata.message_type])
        answers: Iterator[Answer] = method(questions(call, content))
        first = next(answers, None)
        if first is None or first.WhichOneof("part") != "reply":
            raise UserError(f"the trainer on '{path}' answers without a reply; update both sides.")
        try:
            return decode_content(first.reply.content, (answer.data for answer in answers))
        except ContentRefused as error:
            raise UserError(f"the reply of the trainer on '{path}' is damaged: {error}") from None


def call_of(message: Message, context: Context) -> Call:
    """The header of a request: node and run, the run's configuration, the content's header.

    The settings are sorted: Flower gives each process another order, and the trainer recognises a
    repeated message by the header's bytes.
    """
    job = message.content.config_records.get("job")
    return Call(
        version=flexlora.__version__,
        fingerprint=str(job.get("fingerprint", "")) if job else "",
        run_id=context.run_id,
        node_id=context.node_id,
        client_id=str(context.node_config.get("client-id", "")),
        settings=encode_entries(dict(sorted(context.run_config.items()))),
        content=encode_header(message.content),
    )


def questions(call: Call, content: RecordDict) -> Iterator[Question]:
    """The parts of a request; gRPC pulls the next one when the trainer has read the last."""
    yield Question(call=call)
    for part in array_parts(content):
        yield Question(data=part)


def health(path: Path) -> HealthReply:
    """The state of the trainer on ``path``.

    Raises:
        UserError: no trainer there.
    """
    with trainer_on(path) as stub:
        return stub.Health(HealthRequest(), timeout=HEALTH_SECONDS)


@contextmanager
def trainer_on(path: Path) -> Iterator[TrainerStub]:
    """A stub for one call; gRPC's errors become ``UserError``, ``Transient`` where they pass."""
    why = connection_error(path)
    if why:
        raise Transient(
            f"the trainer on '{path}' cannot be reached: {why}; start it with `flexlora client "
            "serve`, or take trainer-socket out of the node config."
        )
    options = [
        ("grpc.max_receive_message_length", 4 * PART_BYTES),
        ("grpc.max_send_message_length", 4 * PART_BYTES),
    ]
    try:
        with grpc.insecure_channel(f"unix:{path}", options=options) as channel:
            yield TrainerStub(channel)
    except grpc.RpcError as error:
        kind = Transient if error.code() in PASSING else UserError
        raise kind(_sentence(path, error)) from None


def _sentence(path: Path, error: grpc.RpcError) -> str:
    """The cause of a failed call, for ``clients.csv``."""
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.UNAVAILABLE:
        return (
            f"the trainer on '{path}' went away while it was asked ({details}); a message that is "
            "sent again is answered from its disk if it had finished."
        )
    if code == grpc.StatusCode.CANCELLED:
        return f"the trainer on '{path}' broke off a request whose bytes did not come."
    return f"the trainer on '{path}' refused: {details}"
