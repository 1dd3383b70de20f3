"""The gRPC service around a ``ResidentTrainer``: checks, the lock, limits, the reply.

    header           version, base, client and announced size, checked before anything is read
    disk             the reply to the same call, if it is stored
    lock             one request at a time; meanwhile the bytes stay with the caller
    bytes, work      received within their limits; the reply is stored
    reply            a header, then parts of at most 1 MiB

A caller that disconnects does not stop a training: its reply is stored for a repeated request.
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
from flexlora.clients.failure_reply import is_transient
from flexlora.clients.trainer.activity_log import ActivityLog
from flexlora.clients.trainer.content_codec import (
    PART_BYTES,
    ContentRefused,
    array_bytes,
    encode_entries,
)
from flexlora.clients.trainer.request_lock import Busy, RequestLock
from flexlora.clients.trainer.resident import PreparedReply, ResidentTrainer, describe_call
from flexlora.clients.trainer.sockets import check_free, open_to, remove
from flexlora.clients.trainer.trainer_pb2 import (
    Answer,
    Call,
    HealthReply,
    HealthRequest,
    Question,
    Quota,
)
from flexlora.clients.trainer.trainer_pb2_grpc import TrainerServicer, add_TrainerServicer_to_server
from flexlora.errors import UserError, one_line

__all__ = ["MESSAGE_LIMIT", "Limits", "TrainerService", "listen", "stop"]

MESSAGE_LIMIT = 4 * PART_BYTES  # a header, or a part and its tag
THREADS = 8  # one works, up to four wait, the others answer Health
LONGEST_CAUSE = 2000  # characters; a gRPC status holds a few kilobytes
SEND_SECONDS = 30.0  # for replies that are being sent when the trainer stops


Context = grpc.ServicerContext
Questions = Iterator[Question]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes of a request, seconds of waiting for the lock, seconds without a byte."""

    request_bytes: int = 2 * 2**30
    wait_seconds: float = 600.0
    stall_seconds: float = 60.0


class TrainerService(TrainerServicer):
    """Answers calls; every refusal says its cause."""

    def __init__(
        self,
        trainer: ResidentTrainer,
        *,
        limits: Limits | None = None,
        log: ActivityLog | None = None,
    ) -> None:
        self.trainer, self.limits, self.log = trainer, limits or Limits(), log or ActivityLog()
        self.lock = RequestLock(wait_seconds=self.limits.wait_seconds)

    def Capability(self, request_iterator: Questions, context: Context) -> Iterator[Answer]:
        return self._serve(MessageType.QUERY, request_iterator, context)

    def Train(self, request_iterator: Questions, context: Context) -> Iterator[Answer]:
        return self._serve(MessageType.TRAIN, request_iterator, context)

    def Evaluate(self, request_iterator: Questions, context: Context) -> Iterator[Answer]:
        return self._serve(MessageType.EVALUATE, request_iterator, context)

    def Health(self, request: HealthRequest, context: Context) -> HealthReply:
        doing, seconds = self.lock.current
        trainer, (files, size) = self.trainer, self.trainer.replies.usage()
        runs, private = trainer.run_files.usage()
        return HealthReply(
            version=flexlora.__version__,
            fingerprint=trainer.fingerprint,
            model=trainer.owner.config.model.name,
            quantization=trainer.owner.config.model.quantization,
            device=trainer.device,
            runs=trainer.kernels.runs,
            absent=trainer.kernels.absent,
            doing=doing,
            seconds=seconds,
            stopping=self.lock.stopping,
            kept_files=files,
            kept_bytes=size,
            free_bytes=trainer.free_bytes,
            limits=encode_entries(trainer.limits.flat()),
            quotas=[
                Quota(key=key, used=used, allowed=allowed)
                for key, used, allowed in (*trainer.rules.quotas(), *trainer.privacy.quotas())
            ],
            private_runs=runs,
            private_bytes=private,
            **vars(trainer.totals),
        )

    def _serve(self, message_type: str, questions: Questions, context: Context) -> Iterator[Answer]:
        try:
            reply = self._reply(message_type, questions, context)
        except Exception as error:
            status, cause = refusal(error)
            self.log.line(f"{message_type} refused: {cause}")
            context.abort(status, cause[:LONGEST_CAUSE])
        self.log.line(reply.line)
        try:
            yield Answer(reply=reply.header)
            for part in reply.parts:
                yield Answer(data=part)
        finally:
            reply.close()

    def _reply(self, message_type: str, questions: Questions, context: Context) -> PreparedReply:
        call = self._call(questions, context)
        client_id = self.trainer.check(call)
        stored = self.trainer.find(message_type, call, client_id)
        if stored is not None:
            return stored
        refused = self.trainer.refuse(message_type, call, client_id)
        if refused is not None:
            return refused
        doing = describe_call(message_type, call)
        with self.lock.held(doing, context.is_active), self.log.running(doing):
            # The same call may have been answered while this one waited.
            stored = self.trainer.find(message_type, call, client_id)
            if stored is not None:
                return stored
            parts = self._parts(questions, context)
            return self.trainer.work(message_type, call, client_id, parts)

    def _call(self, questions: Questions, context: Context) -> Call:
        with cancel_if_stalled(context, self.limits.stall_seconds):
            first = next(questions, None)
        if first is None or first.WhichOneof("part") != "call":
            raise ContentRefused("a request begins with a call, and this one does not.")
        size = first.call.ByteSize() + array_bytes(first.call.content)
        if size > self.limits.request_bytes:
            raise ContentRefused(
                f"the request brings {size:,} bytes, expected {self.limits.request_bytes:,} at "
                "most; start the trainer with a larger --max-request."
            )
        return first.call

    def _parts(self, questions: Questions, context: Context) -> Iterator[bytes]:
        with cancel_if_stalled(context, self.limits.stall_seconds) as moved:
            for question in questions:
                if question.WhichOneof("part") != "data":
                    raise ContentRefused("a second call came where bytes were due.")
                moved.set()
                yield question.data


def refusal(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The gRPC status and the cause of a call that failed."""
    statuses = {
        UserError: grpc.StatusCode.FAILED_PRECONDITION,
        ContentRefused: grpc.StatusCode.INVALID_ARGUMENT,
        Busy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
    for kind, status in statuses.items():
        if isinstance(error, kind):
            return status, str(error)
    if is_transient(error):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, one_line(error)
    return grpc.StatusCode.INTERNAL, one_line(error)


@contextmanager
def cancel_if_stalled(context: Context, seconds: float) -> Iterator[threading.Event]:
    """Cancel the call if the event is not set for ``seconds``: a silent caller holds the lock."""
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
    """A gRPC server for ``service`` on the socket ``path``, not yet started.

    Raises:
        UserError: the socket is in use or cannot be made.
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
    """Refuse new requests, let the running one end within ``grace`` seconds, remove the socket.

    Returns whether it has ended; if not, its thread still runs.
    """
    ended = service.lock.close(grace)
    server.stop(SEND_SECONDS if ended else 0).wait()
    remove(path)
    service.trainer.close()
    return ended
