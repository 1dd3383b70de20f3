"""The gRPC service around a ``ResidentTrainer``: what arrives, what is refused, what goes back.

    header           version, base, client and announced size are checked before anything is read
    disk             the same call finished before: its reply, whoever is training meanwhile
    turn             one at a time; until then the caller's bytes stay with the caller
    bytes, work      received within their limits, done, kept
    reply            a header, then parts of at most 1 MiB

A caller that goes away does not stop a training: what comes of it is kept, and a repeated request
is answered from there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from flwr.app import MessageType

import flexlora
from flexlora.clients.trainer.contents import PART_BYTES, ContentRefused, data_bytes
from flexlora.clients.trainer.resident import Answered, ResidentTrainer, what
from flexlora.clients.trainer.sockets import check_free, open_to, remove
from flexlora.clients.trainer.telling import Teller
from flexlora.clients.trainer.trainer_pb2 import Answer, Call, HealthReply, HealthRequest, Question
from flexlora.clients.trainer.trainer_pb2_grpc import TrainerServicer, add_TrainerServicer_to_server
from flexlora.clients.trainer.turns import Busy, Turns
from flexlora.errors import UserError, one_line

__all__ = ["MESSAGE_LIMIT", "Limits", "TrainerService", "listen", "stop"]

MESSAGE_LIMIT = 4 * PART_BYTES  # a header, or a part and its tag
THREADS = 8  # one works, a few wait for it, the others say how it is
LONGEST_CAUSE = 2000  # characters; a status has room for a few kilobytes
SENDING = 30.0  # seconds for replies on their way when the trainer stops


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is accepted: bytes of a request, seconds in the queue, seconds without a byte."""

    request_bytes: int = 2 * 2**30
    wait_seconds: float = 600.0
    stall_seconds: float = 60.0


class TrainerService(TrainerServicer):
    """Answers calls; everything that can be refused is refused with a sentence."""

    def __init__(
        self,
        trainer: ResidentTrainer,
        *,
        limits: Limits | None = None,
        teller: Teller | None = None,
    ) -> None:
        self.trainer, self.limits, self.teller = trainer, limits or Limits(), teller or Teller()
        self.turns = Turns(wait_seconds=self.limits.wait_seconds)

    def Capability(  # noqa: N802
        self, request_iterator: Iterator[Question], context: grpc.ServicerContext
    ) -> Iterator[Answer]:
        return self._serve(MessageType.QUERY, request_iterator, context)

    def Train(  # noqa: N802
        self, request_iterator: Iterator[Question], context: grpc.ServicerContext
    ) -> Iterator[Answer]:
        return self._serve(MessageType.TRAIN, request_iterator, context)

    def Evaluate(  # noqa: N802
        self, request_iterator: Iterator[Question], context: grpc.ServicerContext
    ) -> Iterator[Answer]:
        return self._serve(MessageType.EVALUATE, request_iterator, context)

    def Health(self, request: HealthRequest, context: grpc.ServicerContext) -> HealthReply:  # noqa: N802
        doing, seconds = self.turns.now
        trainer, (files, size) = self.trainer, self.trainer.kept.held()
        return HealthReply(
            version=flexlora.__version__,
            fingerprint=trainer.fingerprint,
            model=trainer.node.config.model.name,
            quantization=trainer.node.config.model.quantization,
            device=trainer.device,
            runs=trainer.kernels.runs,
            absent=trainer.kernels.absent,
            doing=doing,
            seconds=seconds,
            stopping=self.turns.stopping,
            kept_files=files,
            kept_bytes=size,
            free_bytes=trainer.free_bytes,
            **vars(trainer.tally),
        )

    def _serve(
        self, message_type: str, questions: Iterator[Question], context: grpc.ServicerContext
    ) -> Iterator[Answer]:
        try:
            answered = self._answered(message_type, questions, context)
        except Exception as error:
            status, cause = refusal(error)
            self.teller.line(f"{message_type} refused: {cause}")
            context.abort(status, cause[:LONGEST_CAUSE])
        self.teller.line(answered.line)
        try:
            yield Answer(reply=answered.header)
            for part in answered.parts:
                yield Answer(data=part)
        finally:
            answered.close()

    def _answered(
        self, message_type: str, questions: Iterator[Question], context: grpc.ServicerContext
    ) -> Answered:
        call = self._opening(questions, context)
        client_id = self.trainer.check(call)
        found = self.trainer.find(message_type, call, client_id)
        if found is not None:
            return found
        doing = what(message_type, call)
        with self.turns.taken(doing, context.is_active), self.teller.working(doing):
            # The same call may have been at work while this one waited.
            found = self.trainer.find(message_type, call, client_id)
            if found is not None:
                return found
            parts = self._data(questions, context)
            return self.trainer.work(message_type, call, client_id, parts)

    def _opening(self, questions: Iterator[Question], context: grpc.ServicerContext) -> Call:
        with impatient(context, self.limits.stall_seconds):
            first = next(questions, None)
        if first is None or first.WhichOneof("part") != "call":
            raise ContentRefused("a request begins with a call, and this one does not.")
        size = data_bytes(first.call.content)
        if size > self.limits.request_bytes:
            raise ContentRefused(
                f"the request brings {size:,} bytes, expected {self.limits.request_bytes:,} at "
                "most; start the trainer with a larger --max-request."
            )
        return first.call

    def _data(
        self, questions: Iterator[Question], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        with impatient(context, self.limits.stall_seconds) as moved:
            for question in questions:
                if question.WhichOneof("part") != "data":
                    raise ContentRefused("a second call came where bytes were due.")
                moved.set()
                yield question.data


def refusal(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status and the sentence of a call that was not answered."""
    if isinstance(error, UserError):
        return grpc.StatusCode.FAILED_PRECONDITION, str(error)
    if isinstance(error, ContentRefused):
        return grpc.StatusCode.INVALID_ARGUMENT, str(error)
    if isinstance(error, Busy):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
    return grpc.StatusCode.INTERNAL, one_line(error)


@contextmanager
def impatient(context: grpc.ServicerContext, seconds: float) -> Iterator[threading.Event]:
    """Cancel the call if the event is not set for so long: a silent caller would hold the turn."""
    moved, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            if not moved.is_set():
                context.cancel()
                return
            moved.clear()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield moved
    finally:
        ended.set()


def listen(service: TrainerService, path: Path, group: str = "") -> grpc.Server:
    """A server for ``service`` on the socket ``path``, not yet started.

    Raises:
        UserError: the socket is taken or cannot be made.
    """
    options = [
        ("grpc.max_receive_message_length", MESSAGE_LIMIT),
        ("grpc.max_send_message_length", MESSAGE_LIMIT),
    ]
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="calls"),
        options=options,
        maximum_concurrent_rpcs=4 * THREADS,
    )
    add_TrainerServicer_to_server(service, server)
    check_free(path)
    try:
        with open_to(path, group):
            server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise UserError(f"the socket '{path}' cannot be made: {one_line(error)}.") from None
    return server


def stop(service: TrainerService, server: grpc.Server, path: Path, grace: float) -> bool:
    """Take no more work, let what is in flight end within ``grace`` seconds, remove the socket.

    Returns whether it has ended; if not, its thread still runs.
    """
    ended = service.turns.close(grace)
    server.stop(SENDING if ended else 0).wait()
    remove(path)
    service.trainer.close()
    return ended
