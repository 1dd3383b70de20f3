"""The trainer itself, free of any transport: one base, one node's rows, one thing at a time.

All of a trainer's arithmetic happens in one thread of its own: the number of torch's threads is set
per thread, and with another number a sum is another sum. So is the order of requests: whoever comes
second waits (``turns.py``).
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
from flexlora.clients.trainer.answers import answer, cause_of
from flexlora.clients.trainer.contents import data_parts, describe, read_entries, rebuild
from flexlora.clients.trainer.failures import failure
from flexlora.clients.trainer.node import Node, data_state, job_config
from flexlora.clients.trainer.store import KeptReplies, KeptReply
from flexlora.clients.trainer.trainer_pb2 import Call, Reply, Value
from flexlora.clients.worker import Worker, worker_for
from flexlora.errors import UserError, one_line
from flexlora.planning.probing import device_name, probe
from flexlora.training.personal_store import PersonalStore
from flexlora.training.uplink import feedback_beside

__all__ = ["Answered", "ResidentTrainer", "Tally"]


@dataclass(kw_only=True)
class Tally:
    """What a trainer has done since it started."""

    trained: int = 0
    evaluated: int = 0
    from_disk: int = 0


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A reply ready to be sent: its header, its arrays' bytes part by part, and a line about it.

    ``close`` lets go of what the parts are read from, sent or not.
    """

    header: Reply
    parts: Iterator[bytes]
    line: str
    close: Callable[[], None] = lambda: None


@dataclass(kw_only=True)
class ResidentTrainer:
    """Loads ``node``'s base and rows once and answers calls.

    Raises:
        UserError: a base or data that cannot be had, no rows to train on.
    """

    node: Node
    kept: KeptReplies
    limit_bytes: int = 0
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        self._pool.submit(self._open).result()

    def _open(self) -> None:
        worker = worker_for(self.node.config)
        first = worker.capability(worker.client_ids[0])
        if first.cause:
            raise UserError(f"nothing can be trained here: {first.cause}.")
        # Later workers are made with the base in memory already.
        self.free_bytes = min(first.free_bytes, self.limit_bytes or first.free_bytes)
        self.fingerprint, self.num_examples = worker.base.fingerprint, first.num_examples
        self.device, self.kernels = device_name(worker.base.device), probe(worker.base.device)

    def check(self, call: Call) -> str:
        """The client that a call is for.

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
                f"{self.fingerprint} ({self.node.config.model.name}); serve the run's base."
            )
        return self.node.name_for(call.client_id, call.node_id)

    def find(self, message_type: str, call: Call, client_id: str) -> Answered | None:
        """The reply to the same call, if one was finished."""
        kept = self.kept.find(self._name(message_type, call, client_id))
        if kept is None:
            return None
        self.tally.from_disk += 1
        return _from_disk(kept, f"{what(message_type, call)}: answered from disk")

    def work(
        self, message_type: str, call: Call, client_id: str, parts: Iterable[bytes]
    ) -> Answered:
        """Receive the call's arrays, do what it asks and keep what came of it.

        Raises:
            ContentRefused: bytes that are not the call's.
        """
        started = time.perf_counter()
        done = self._pool.submit(self._answer, message_type, call, client_id, parts)
        content = done.result()
        cause, asked = cause_of(content), what(message_type, call)
        seconds = time.perf_counter() - started
        line = f"{asked}: {cause or _told(message_type, content)}, {seconds:.1f} s"
        header = Reply(content=describe(content))
        self.tally.trained += message_type == MessageType.TRAIN and not cause
        self.tally.evaluated += message_type == MessageType.EVALUATE and not cause
        if cause or not self._lasts(message_type, call):
            return Answered(header=header, parts=data_parts(content), line=line)
        name = self._name(message_type, call, client_id)
        try:
            return _from_disk(self.kept.keep(name, header, data_parts(content)), line, new=True)
        except OSError as error:
            note = f"{line}; not kept: {error.strerror or error}"
            return Answered(header=header, parts=data_parts(content), line=note)

    def close(self) -> None:
        """Let go of the folder of replies; the thread ends with what it is doing."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.kept.close()

    def _answer(
        self, message_type: str, call: Call, client_id: str, parts: Iterable[bytes]
    ) -> RecordDict:
        content = rebuild(call.content, parts)
        try:
            worker = self._worker(read_entries(call.settings), client_id)
        except Exception as error:
            return failure(message_type, client_id, one_line(error))
        own = self._personal(call)
        return answer(
            message_type,
            content,
            worker,
            client_id,
            personal=own if worker.config.personal.rank else None,
            feedback=feedback_beside(own),
            free_bytes=self.free_bytes,
            drop=True,
        )

    def _personal(self, call: Call) -> PersonalStore:
        """Where what this node keeps of a run lies; unlike replies it is not removed.

        A run that goes on with another names it as its origin.
        """
        origin = _job_value(call, "origin").text
        number = origin if origin.isascii() and origin.isdigit() else call.run_id
        return PersonalStore(self.kept.folder / "personal" / f"run-{number}")

    def _lasts(self, message_type: str, call: Call) -> bool:
        """Whether a reply may be given again: it depends on nothing that its name does not hold."""
        own = read_entries(call.settings).get("personal.rank", 0)
        return message_type == MessageType.TRAIN or (
            message_type == MessageType.EVALUATE and not own
        )

    def _worker(self, run: Mapping[str, object], client_id: str) -> Worker:
        """The worker of a run's configuration; the base is the same for all."""
        worker = worker_for(job_config(self.node.config, run))
        worker.data.rename(client_id)
        return worker

    def _name(self, message_type: str, call: Call, client_id: str) -> str:
        """A file name that two calls share only if the same must come of both."""
        same = Call()
        same.CopyFrom(call)
        same.node_id, same.client_id = 0, client_id  # Flower may give a node another number
        state = data_state(self.node.config.data.path)
        digest = hashlib.sha256(f"{self.fingerprint}|{state}|".encode())
        digest.update(repr(sorted(self.node.config.flat().items())).encode())
        digest.update(same.SerializeToString(deterministic=True))
        number = server_round(call)
        return f"{message_type}-run{call.run_id}-round{number}-{digest.hexdigest()[:40]}"


def _from_disk(kept: KeptReply, line: str, *, new: bool = False) -> Answered:
    header = Reply()
    header.CopyFrom(kept.header)
    header.kept = not new
    return Answered(header=header, parts=kept.parts(), line=line, close=kept.close)


def server_round(call: Call) -> int:
    """The round that a call's job names, 0 where it names none."""
    return max(0, _job_value(call, "server-round").whole)


def _job_value(call: Call, key: str) -> Value:
    """What a call's job says under ``key``; an empty value where it says nothing."""
    for record in call.content.records:
        for entry in record.values.entries if record.name == "job" else ():
            if entry.key == key:
                return entry.value
    return Value()


def what(message_type: str, call: Call) -> str:
    """A few words about a call: ``train, run 7, round 3``."""
    return f"{message_type}, run {call.run_id}, round {server_round(call)}"


def _told(message_type: str, content: RecordDict) -> str:
    """What came of a call, in a few words."""
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
