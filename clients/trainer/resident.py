"""The trainer without a transport: one base, one node's rows, one request at a time.

One worker thread does all arithmetic: torch keeps its number of threads per thread, and another
number makes other sums. ``RequestLock`` keeps requests in order.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
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
from flexlora.clients.trainer.limits import DAY, OwnerLimits
from flexlora.clients.trainer.memory_limit import rows_that_fit
from flexlora.clients.trainer.owner_config import OwnerConfig, data_digest, job_config
from flexlora.clients.trainer.owner_rules import OwnerRules
from flexlora.clients.trainer.privacy_ledger import PrivacyLedger
from flexlora.clients.trainer.privacy_rules import PrivacyRules
from flexlora.clients.trainer.quota_ledger import QuotaLedger
from flexlora.clients.trainer.reply_store import ReplyStore, StoredReply
from flexlora.clients.trainer.run_files import RunFiles
from flexlora.clients.trainer.trainer_pb2 import Call, Reply, Value
from flexlora.clients.worker import Worker, worker_for
from flexlora.config.resolve import Config
from flexlora.data.row_bound import RowBound
from flexlora.errors import UserError
from flexlora.planning.probing import device_name, probe
from flexlora.training.personal_store import PersonalStore
from flexlora.training.uplink import feedback_store
from flexlora.units import parse_bytes
from flexlora.wire.jobs import EvalJob, TrainJob

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
    limits: OwnerLimits = field(default_factory=OwnerLimits)
    limit_bytes: int = 0
    totals: Totals = field(default_factory=Totals)

    def __post_init__(self) -> None:
        ledger = QuotaLedger(self.replies.folder / "quotas.json")
        self.rules = OwnerRules(self.limits, ledger)
        spent = PrivacyLedger(self.replies.folder / "privacy.json")
        self.privacy = PrivacyRules(self.limits.privacy, spent)
        self.bound = RowBound(**dict(self.limits.data))
        self.run_files = RunFiles(
            self.replies.folder / "personal",
            max_bytes=parse_bytes(self.limits.files.max_bytes, "files.max-bytes"),
            max_seconds=self.limits.files.days * DAY,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        self._thread.submit(self._load).result()

    def _load(self) -> None:
        worker = worker_for(self.owner.config, self.bound)
        first = worker.capability(worker.client_ids[0])
        if first.cause:
            raise UserError(f"nothing can be trained here: {first.cause}.")
        # Later workers measure their free memory with the base already loaded.
        self.free_bytes = min(first.free_bytes, self.limit_bytes or first.free_bytes)
        self.fingerprint = worker.base.fingerprint
        self.rows = worker.data.count(first.client_id, "train")
        self.held_rows = worker.data.held(first.client_id)
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

    def refuse(self, message_type: str, call: Call, client_id: str) -> PreparedReply | None:
        """The reply to a call that asks for more than the owner allows; None if it does not.

        Nothing of the call but its header has been read by then.
        """
        try:
            config = job_config(self.owner.config, decode_entries(call.settings))
            self.rules.refuse_settings(message_type, config, self.held_rows)
            if message_type != MessageType.EVALUATE:
                self.privacy.refuse_mode(config)
        except UserError as error:
            return self._failed(message_type, call, client_id, error)
        return None

    def work(
        self, message_type: str, call: Call, client_id: str, parts: Iterable[bytes]
    ) -> PreparedReply:
        """Receive the call's arrays, answer it, and store the reply if it can be repeated.

        Raises:
            ContentRefused: bytes that do not match the call's header.
        """
        started = time.perf_counter()
        config = job_config(self.owner.config, decode_entries(call.settings))
        try:
            with self.rules.begin(message_type, config, self.held_rows) as running:
                over = running.over if running else None
                given = (message_type, call, client_id, config, parts, over)
                content = self._thread.submit(self._answer, *given).result()
        except UserError as error:
            return self._failed(message_type, call, client_id, error)
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

    def _failed(
        self, message_type: str, call: Call, client_id: str, error: UserError
    ) -> PreparedReply:
        """The reply with a cause and nothing else."""
        content = reply_of(message_type, client_id, error)
        line = f"{describe_call(message_type, call)}: {cause_of(content)}"
        return PreparedReply(
            header=Reply(content=encode_header(content)), parts=array_parts(content), line=line
        )

    def _answer(
        self,
        message_type: str,
        call: Call,
        client_id: str,
        config: Config,
        parts: Iterable[bytes],
        over: Callable[[], str] | None,
    ) -> RecordDict:
        content = decode_content(call.content, _received(parts, over))
        try:
            worker = self._worker(config, client_id)
        except Exception as error:
            return reply_of(message_type, client_id, error)
        personal, run = PersonalStore(self._run_folder(call)), _run_of(call)
        with worker.interrupted_by(over):
            reply = answer(
                message_type,
                content,
                worker,
                client_id,
                personal=personal if worker.config.personal.rank else None,
                feedback=feedback_store(personal),
                free_bytes=self.free_bytes,
                drop=True,
                check=lambda job: self._check(job, worker, run),
            )
        if message_type == MessageType.TRAIN and not cause_of(reply):
            try:
                self.privacy.spend(worker.config, run, self._num_rows(worker, client_id))
            except OSError as error:
                return reply_of(message_type, client_id, error)  # what is not counted stays here
        with suppress(OSError):  # the reply is worth more
            self.run_files.trim(at_work=[self._run_folder(call)])
        return reply

    def _worker(self, config: Config, client_id: str) -> Worker:
        """The worker of a run's configuration; the base is the same for all runs."""
        worker = worker_for(config, self.bound)
        worker.data.rename(client_id)
        return worker

    @staticmethod
    def _num_rows(worker: Worker, client_id: str) -> int:
        return worker.data.count(client_id, "train").examples

    def _check(self, job: TrainJob | EvalJob, worker: Worker, run: str) -> None:
        """Refuse ranks that are too high and budgets that are spent; keep within the memory."""
        self.rules.refuse_job(job)
        if isinstance(job, TrainJob):
            num_rows = self._num_rows(worker, job.client_id)
            self.privacy.refuse_round(worker.config, run, num_rows)
        on_cpu = worker.base.device.type == "cpu"
        if self.limit_bytes and on_cpu and isinstance(job, TrainJob):
            rows = rows_that_fit(worker.config, job, self.limit_bytes)
            if rows < worker.config.train.per_device_train_batch_size:
                worker.limit_rows(job.client_id, rows)

    def _run_folder(self, call: Call) -> Path:
        """The client's factors and rounding errors of a run."""
        return self.run_files.of_run(_run_of(call))

    def _file_name(self, message_type: str, call: Call, client_id: str) -> str:
        """A file name that holds a digest of all that the reply depends on."""
        same = Call()
        same.CopyFrom(call)
        same.node_id, same.client_id = 0, client_id  # Flower may give a node another number
        state = data_digest(self.owner.config.data.path)
        digest = hashlib.sha256(f"{self.fingerprint}|{state}|".encode())
        digest.update(repr((sorted(self.owner.config.flat().items()), self.bound)).encode())
        digest.update(same.SerializeToString(deterministic=True))
        server_round = _server_round(call)
        return f"{message_type}-run{call.run_id}-round{server_round}-{digest.hexdigest()[:40]}"


def _received(parts: Iterable[bytes], over: Callable[[], str] | None) -> Iterator[bytes]:
    """The parts of a request, until ``over`` gives a reason to end it.

    Raises:
        UserError: with the reason.
    """
    for part in parts:
        yield part
        if over and (why := over()):
            raise UserError(f"ended while its arrays came: {why}")


def _is_repeatable(message_type: str, call: Call) -> bool:
    """Whether the call alone determines the reply; an evaluation may depend on personal factors."""
    personal = decode_entries(call.settings).get("personal.rank", 0)
    return message_type == MessageType.TRAIN or (
        message_type == MessageType.EVALUATE and not personal
    )


def _run_of(call: Call) -> str:
    """The run of a call; a resumed run names its origin."""
    origin = _job_value(call, "origin").text
    return origin if origin.isascii() and origin.isdigit() else str(call.run_id)


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
        done = f"{report['rank-class']}, {report['num-examples']} examples, {report['steps']} steps"
        if report["withheld"]:
            return f"{done}, with noise"
        return f"{done}, loss {report['loss-before']:.3f} to {report['loss-after']:.3f}"
    if message_type == MessageType.EVALUATE:
        return f"{len(records) - 1} adapters scored"
    return f"{records['capability']['num-examples']} examples"
