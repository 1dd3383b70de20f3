"""The trainer without a transport: one base, one node's rows, one request at a time.

One worker thread does all arithmetic: torch keeps its number of threads per thread, and another
number makes other sums. ``RequestLock`` keeps requests in order.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from flwr.app import MessageType, RecordDict

import flexlora
from flexlora.clients.failure_reply import cause_of, reply_of
from flexlora.clients.handler import answer
from flexlora.clients.trainer.content_codec import (
    array_parts,
    decode_content,
    decode_entries,
    encode_header,
)
from flexlora.clients.trainer.owner_config import OwnerConfig, data_digest, job_config
from flexlora.clients.trainer.reply_store import ReplyStore, StoredReply
from flexlora.clients.trainer.trainer_pb2 import Call, Reply, Value
from flexlora.clients.worker import Worker, worker_for
from flexlora.errors import UserError
from flexlora.planning.probing import device_name, probe
from flexlora.training.personal_store import PersonalStore
from flexlora.training.uplink import feedback_store

__all__ = ["PreparedReply", "ResidentTrainer", "Totals", "describe_call"]


@dataclass(kw_only=True)
class Totals:
    """Requests that a trainer has answered since it started."""

    trained: int = 0
    evaluated: int = 0
    from_disk: int = 0


@dataclass(frozen=True, kw_only=True)
class PreparedReply:
    """A reply ready to send: header, arrays' bytes in parts, and a line for the log.

    ``close`` releases the file behind the parts, whether they were sent or not.
    """

    header: Reply
    parts: Iterator[bytes]
    line: str
    close: Callable[[], None] = lambda: None

    @classmethod
    def stored(cls, reply: StoredReply, line: str, *, repeated: bool) -> PreparedReply:
        header = Reply()
        header.CopyFrom(reply.header)
        header.kept = repeated
        return cls(header=header, parts=reply.parts(), line=line, close=reply.close)


@dataclass(kw_only=True)
class ResidentTrainer:
    """Loads the owner's base and rows once and answers calls.

    Raises:
        UserError: a base or data that cannot be loaded, no rows to train on.
    """

    owner: OwnerConfig
    replies: ReplyStore
    limit_bytes: int = 0
    totals: Totals = field(default_factory=Totals)

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        self._thread.submit(self._load).result()

    def _load(self) -> None:
        worker = worker_for(self.owner.config)
        first = worker.capability(worker.client_ids[0])
        if first.cause:
            raise UserError(f"nothing can be trained here: {first.cause}.")
        # Later workers measure their free memory with the base already loaded.
        self.free_bytes = min(first.free_bytes, self.limit_bytes or first.free_bytes)
        self.fingerprint = worker.base.fingerprint
        self.rows = worker.data.count(first.client_id, "train")
        self.device, self.kernels = device_name(worker.base.device), probe(worker.base.device)

    def check(self, call: Call) -> str:
        """The client id of a call.

        Raises:
            UserError: it was made for another FlexLoRA, another base or another client.
        """
        if call.version != flexlora.__version__:
            raise UserError(
                f"the ClientApp is FlexLoRA {call.version or 'of no version'}, the trainer is "
                f"{flexlora.__version__}; install the same one for both."
            )
        if call.fingerprint and call.fingerprint != self.fingerprint:
            raise UserError(
                f"the request is for the base {call.fingerprint}, the trainer holds "
                f"{self.fingerprint} ({self.owner.config.model.name}); serve the run's base."
            )
        return self.owner.name_for(call.client_id, call.node_id)

    def find(self, message_type: str, call: Call, client_id: str) -> PreparedReply | None:
        """The stored reply to the same call, if there is one."""
        stored = self.replies.find(self._file_name(message_type, call, client_id))
        if stored is None:
            return None
        self.totals.from_disk += 1
        line = f"{describe_call(message_type, call)}: answered from disk"
        return PreparedReply.stored(stored, line, repeated=True)

    def work(
        self, message_type: str, call: Call, client_id: str, parts: Iterable[bytes]
    ) -> PreparedReply:
        """Receive the call's arrays, answer it, and store the reply if it can be repeated.

        Raises:
            ContentRefused: bytes that do not match the call's header.
        """
        started = time.perf_counter()
        done = self._thread.submit(self._answer, message_type, call, client_id, parts)
        content = done.result()
        cause, seconds = cause_of(content), time.perf_counter() - started
        outcome = cause or _summary(message_type, content)
        line = f"{describe_call(message_type, call)}: {outcome}, {seconds:.1f} s"
        self.totals.trained += message_type == MessageType.TRAIN and not cause
        self.totals.evaluated += message_type == MessageType.EVALUATE and not cause
        header = Reply(content=encode_header(content))
        if not cause and _is_repeatable(message_type, call):
            name = self._file_name(message_type, call, client_id)
            try:
                stored = self.replies.put(name, header, array_parts(content))
                return PreparedReply.stored(stored, line, repeated=False)
            except OSError as error:
                line = f"{line}; not kept: {error.strerror or error}"
        return PreparedReply(header=header, parts=array_parts(content), line=line)

    def close(self) -> None:
        """Unlock the folder of replies; the thread ends after what it is doing."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.replies.close()

    def _answer(
        self, message_type: str, call: Call, client_id: str, parts: Iterable[bytes]
    ) -> RecordDict:
        content = decode_content(call.content, parts)
        try:
            worker = self._worker(decode_entries(call.settings), client_id)
        except Exception as error:
            return reply_of(message_type, client_id, error)
        personal = self._personal_store(call)
        return answer(
            message_type,
            content,
            worker,
            client_id,
            personal=personal if worker.config.personal.rank else None,
            feedback=feedback_store(personal),
            free_bytes=self.free_bytes,
            drop=True,
        )

    def _worker(self, run: Mapping[str, object], client_id: str) -> Worker:
        """The worker of a run's configuration; the base is the same for all runs."""
        worker = worker_for(job_config(self.owner.config, run))
        worker.data.rename(client_id)
        return worker

    def _personal_store(self, call: Call) -> PersonalStore:
        """The client's factors and rounding errors of a run; a resumed run names its origin."""
        origin = _job_value(call, "origin").text
        run = origin if origin.isascii() and origin.isdigit() else call.run_id
        return PersonalStore(self.replies.folder / "personal" / f"run-{run}")

    def _file_name(self, message_type: str, call: Call, client_id: str) -> str:
        """A file name that holds a digest of all that the reply depends on."""
        same = Call()
        same.CopyFrom(call)
        same.node_id, same.client_id = 0, client_id  # Flower may give a node another number
        state = data_digest(self.owner.config.data.path)
        digest = hashlib.sha256(f"{self.fingerprint}|{state}|".encode())
        digest.update(repr(sorted(self.owner.config.flat().items())).encode())
        digest.update(same.SerializeToString(deterministic=True))
        server_round = _server_round(call)
        return f"{message_type}-run{call.run_id}-round{server_round}-{digest.hexdigest()[:40]}"


def _is_repeatable(message_type: str, call: Call) -> bool:
    """Whether the call alone determines the reply; an evaluation may depend on personal factors."""
    personal = decode_entries(call.settings).get("personal.rank", 0)
    return message_type == MessageType.TRAIN or (
        message_type == MessageType.EVALUATE and not personal
    )


def _server_round(call: Call) -> int:
    """The round in a call's job, 0 if there is none."""
    return max(0, _job_value(call, "server-round").whole)


def _job_value(call: Call, key: str) -> Value:
    """The value under ``key`` in a call's job, empty if there is none."""
    for record in call.content.records:
        for entry in record.values.entries if record.name == "job" else ():
            if entry.key == key:
                return entry.value
    return Value()


def describe_call(message_type: str, call: Call) -> str:
    """For example ``train, run 7, round 3``."""
    return f"{message_type}, run {call.run_id}, round {_server_round(call)}"


def _summary(message_type: str, content: RecordDict) -> str:
    """The result in a few words, for the log."""
    records: Mapping[str, Mapping[str, Any]] = content.config_records
    if message_type == MessageType.TRAIN:
        report = records["report"]
        return (
            f"{report['rank-class']}, {report['num-examples']} examples, {report['steps']} steps, "
            f"loss {report['loss-before']:.3f} to {report['loss-after']:.3f}"
        )
    if message_type == MessageType.EVALUATE:
        return f"{len(records) - 1} adapters scored"
    return f"{records['capability']['num-examples']} examples"
