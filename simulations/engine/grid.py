"""A Flower ``Grid`` in one process: no SuperLink, one base, many clients in one pass.

The messages are the ones that deployment sends, encoded and decoded as there. Train messages of a
round are packed into cohorts (``cohorts.py``) and handed to a pool (``pool.py``): this process, or
several through Ray. With a world (``world.py``) replies arrive when their clients would send them.

A client that stays to the end of its training stores its personal factors, whichever cohort it was
in and whether or not the server takes its answer. The stores keep what a client had before the
oldest round that a resumed run may send again.

A pass that ran out of memory was halved; no later cohort is planned as large. The sizes that failed
are in ``cohorts.json`` of the run folder, by which a resumed run plans as the run it continues.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from flexlora.clients.failure_reply import reply_of
from flexlora.clients.messages import (
    Memo,
    decode_evaluate_job,
    decode_train_job,
    encode_capability,
    encode_evaluate_result,
    encode_train_result,
)
from flexlora.clients.secure.answering import answer_phase, mask_request_of, masked_reply
from flexlora.clients.secure.session_store import SessionStore
from flexlora.clients.worker import Worker, failed_training
from flexlora.privacy.client_rounds import ClientLedgers
from flexlora.privacy.local_noise import privatized
from flexlora.server.transport.flower_private import (
    NODE_UNAVAILABLE,
    Run,
    act_as_server,
    set_message_id,
)
from flexlora.server.transport.messages import content_bytes
from flexlora.simulations.engine.canary_clients import CanaryClients
from flexlora.simulations.engine.cohorts import CohortLimits, longest_row, plan_cohorts
from flexlora.simulations.engine.pool import Later, LocalPool, Pending, Pool
from flexlora.simulations.world.efforts import effort_of
from flexlora.simulations.world.simulated_time import World
from flexlora.training.personal_store import PersonalStore
from flexlora.training.uplink import Uplink, feedback_store
from flexlora.wire.files import write_atomically
from flexlora.wire.jobs import Capability, EvalJob, EvalResult, TrainJob, TrainResult
from flexlora.wire.secure_messages import SECURE

__all__ = ["FAILED_COHORTS", "InProcessGrid", "rounds_kept"]

FAILED_COHORTS = "cohorts.json"  # in the run folder
EVALUATED_TOGETHER = 32  # clients; a constant, so that scores do not depend on the workers


def rounds_kept(late_rounds: int, keep_checkpoints: int = 1) -> int:
    """The open round, those that replies may still come from, and the one before them.

    Each of the further rounds that a rollback can go back to needs one more.
    """
    return late_rounds + 1 + keep_checkpoints


@dataclass(kw_only=True)
class _Unanswered:
    """A message without a reply yet; its result is at ``place`` of its cohort's results."""

    message: Message
    server_round: int
    job: TrainJob | None = None
    cohort: Pending[Sequence[TrainResult | EvalResult]] | None = None
    place: int = 0
    since: float = 0.0  # simulated seconds at which the client has its personal factors
    stored: bool = False  # whether they are in the store
    client_tokens: int = 0  # of each client in the cohort's pass
    refused: TrainResult | None = None  # where the client's privacy budget is spent

    @property
    def result(self) -> TrainResult | EvalResult:
        assert self.cohort is not None
        return self.cohort.result()[self.place]


class InProcessGrid(Grid):
    """Nodes 1 to N are the worker's clients in order, those after them the canaries, if any.

    All of them have registered beforehand.
    """

    in_process = True  # seconds of training are this machine's, not a client's
    sends_again = True  # replies are functions of what is sent: see late_messages.py

    def __init__(
        self,
        worker: Worker,
        *,
        limits: CohortLimits,
        wire_dtype: str,
        pool: Pool | None = None,
        world: World | None = None,
        personal: PersonalStore | None = None,
        late_rounds: int = 1,
        failed_file: Path | None = None,
        canaries: CanaryClients | None = None,
    ) -> None:
        self.worker, self.wire_dtype, self.canaries = worker, wire_dtype, canaries
        self.failed_file = failed_file
        self.limits = replace(limits, failed=(*limits.failed, *_read_failed(failed_file)))
        self.pool, self.clock, self.late_rounds = pool or LocalPool(worker), world, late_rounds
        self.personal = personal or PersonalStore(rounds_kept=rounds_kept(late_rounds))
        self.feedback = feedback_store(self.personal)
        self.client_ledgers = ClientLedgers(worker.config)  # a resumed server restores them
        added = canaries.canaries.client_ids if canaries is not None else ()
        self._clients = dict(enumerate([*worker.client_ids, *added], start=1))
        self._unanswered: dict[str, _Unanswered] = {}
        self._sessions: dict[str, SessionStore] = {}  # of secure sums, by client
        self._pushed = self._round = 0
        self._met = False
        self._run = Run.create_empty(run_id=1)
        act_as_server(run_id=1)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """The nodes online; before the first round all, for the capability query."""
        if self.clock is None or not self._met:
            return list(self._clients)
        return [node for node, client_id in self._clients.items() if self.clock.online(client_id)]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take the messages, plan the cohorts and hand them to the pool."""
        trained: dict[str, TrainJob] = {}
        evaluated: dict[str, EvalJob] = {}
        memo: Memo = {}
        ids = []
        for message in messages:
            self._pushed += 1
            message_id = f"message-{self._pushed}"
            set_message_id(message, message_id)
            ids.append(message_id)
            kind, client_id = message.metadata.message_type, self._client(message)
            refused = None
            if kind == MessageType.TRAIN:
                job = decode_train_job(message.content, client_id, memo)
                self._round = max(self._round, job.server_round)
                if self._send(message, job):
                    refused = self._spend(job)
                    trained |= {} if refused else {message_id: job}
            elif kind == MessageType.EVALUATE:
                evaluated[message_id] = decode_evaluate_job(message.content, client_id, memo)
                self._round = max(self._round, evaluated[message_id].server_round)
            else:
                self._met = True
            self._unanswered[message_id] = _Unanswered(
                message=message, server_round=self._round, refused=refused
            )
        self._ask_canaries(trained, evaluated)
        self._keep_trained()  # before the same clients train again from them
        self._forget()
        if trained:
            self._submit(trained)
        self._submit_evaluations(evaluated)
        return ids

    def _ask_canaries(self, trained: dict[str, TrainJob], evaluated: dict[str, EvalJob]) -> None:
        """Take the canaries' jobs out, and answer them without the pool."""
        canaries = self.canaries
        if canaries is None:
            return
        for key in [key for key, job in trained.items() if job.client_id in canaries]:
            held, job = self._unanswered[key], trained.pop(key)
            held.job, held.cohort = job, Later(partial(canaries.train, job))
        for key in [key for key, asked in evaluated.items() if asked.client_id in canaries]:
            self._unanswered[key].cohort = Later(partial(canaries.evaluate, evaluated.pop(key)))

    def _spend(self, job: TrainJob) -> TrainResult | None:
        """Enter the round in the client's ledger; the client's refusal if that has no room."""
        if not self.client_ledgers.active:  # a canary has no rows, and is refused where it is
            return None
        num_rows = len(self.worker.train_rows(job))
        if not num_rows:
            return None
        cause = self.client_ledgers.refusal(job.client_id, num_rows)
        if cause:
            return failed_training(job, cause)
        self.client_ledgers.spend(job.client_id, num_rows)
        return None

    def _send(self, message: Message, job: TrainJob) -> bool:
        """Whether the client will answer; on a simulated clock it may leave before."""
        if self.clock is None:
            return True
        effort = effort_of(
            job,
            self.worker,
            wire_dtype=self.wire_dtype,
            bytes_down=content_bytes(message.content),
        )
        return self.clock.send(message.metadata.message_id, effort)

    def _keep_trained(self) -> None:
        """Store the personal factors of every training, whether or not its answer is taken."""
        if self.worker.personal is not None:
            for held in self._unanswered.values():
                self._keep(held)

    def _keep(self, held: _Unanswered) -> None:
        if held.job is not None and not held.stored:
            result = held.result
            assert isinstance(result, TrainResult)
            self.personal.keep([result], [held.job], since=held.since)
            held.stored = True

    def _forget(self) -> None:
        """Drop messages of rounds so old that the server no longer pulls their answers."""
        oldest = self._round - self.late_rounds
        old = [key for key, held in self._unanswered.items() if held.server_round < oldest]
        for message_id in old:
            del self._unanswered[message_id]
            if self.clock is not None:
                self.clock.forget(message_id)

    def _submit(self, jobs: dict[str, TrainJob]) -> None:
        cohorts = plan_cohorts(
            jobs,
            self.limits,
            rows=lambda client_id: self.worker.data.examples(client_id, "train"),
            batch_size=self.worker.settings.per_device_train_batch_size,
            pass_key=self.worker.pass_key,
        )
        for keys in cohorts:
            attached = self.personal.attach([jobs[key] for key in keys])
            cohort = self.pool.train(attached)
            rows = [longest_row(self.worker.train_rows(job)) for job in attached]
            tokens = self.worker.settings.per_device_train_batch_size * max(rows)
            for place, (key, job) in enumerate(zip(keys, attached, strict=True)):
                held = self._unanswered[key]
                held.client_tokens = tokens
                held.cohort, held.place, held.job = cohort, place, job
                held.since = self.clock.arrives(key) if self.clock is not None else 0.0

    def _submit_evaluations(self, jobs: dict[str, EvalJob]) -> None:
        keys = list(jobs)
        for at in range(0, len(keys), EVALUATED_TOGETHER):
            group = keys[at : at + EVALUATED_TOGETHER]
            now = math.inf if self.clock is None else self.clock.now()
            attached = self.personal.attach_eval([jobs[key] for key in group], now=now)
            cohort = self.pool.evaluate(attached)
            for place, key in enumerate(group):
                self._unanswered[key].cohort, self._unanswered[key].place = cohort, place

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Replies to ``message_ids`` that have arrived, each made as it is taken and given once."""
        # Trainings may end whose answers the server never takes; a resumed run finds those too.
        if self.clock is not None or self.worker.config.server.over_selection > 0:
            self._keep_trained()
        for message_id in message_ids:
            arrived = self.clock is None or self.clock.arrived(message_id)
            if message_id in self._unanswered and arrived:
                yield self._answer(self._unanswered.pop(message_id), message_id)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return list(self.pull_messages(self.push_messages(messages)))

    def _client(self, message: Message) -> str:
        return self._clients[message.metadata.dst_node_id]

    def _answer(self, held: _Unanswered, message_id: str) -> Message:
        message, job = held.message, held.job
        lost = self.clock.take(message_id) if self.clock is not None else ""
        if lost:
            return Message(Error(code=NODE_UNAVAILABLE, reason=lost), reply_to=message)
        if held.cohort is None and SECURE in message.content:
            return Message(self._phase(message), reply_to=message)
        if held.refused is not None:
            content = encode_train_result(held.refused, dtype=self.wire_dtype)
            return Message(content, reply_to=message)
        if held.cohort is None:
            return Message(
                encode_capability(self._capability(self._client(message))), reply_to=message
            )
        result = held.result
        if isinstance(result, EvalResult):
            return Message(encode_evaluate_result(result), reply_to=message)
        assert job is not None
        self._keep(held)
        if result.too_many:
            self._learn(result.too_many, result.too_many * held.client_tokens)
        if SECURE in message.content:
            return Message(self._masked(message, result, job), reply_to=message)
        uplink = Uplink.of(self.worker.config, self.feedback, dtype=self.wire_dtype)
        return Message(
            encode_train_result(
                uplink.ready(privatized(result, job, self.worker.config), job),
                dtype=self.wire_dtype,
                start=job.start.for_client(job.client_id),
            ),
            reply_to=message,
        )

    def _phase(self, message: Message) -> RecordDict:
        """The reply to a phase of a secure sum; sessions are here, wherever cohorts are trained."""
        client_id = self._client(message)
        store = self._sessions.setdefault(client_id, SessionStore())
        try:
            return answer_phase(message.content[SECURE], self.worker.config, store)
        except Exception as error:
            return reply_of(MessageType.QUERY, client_id, error)

    def _masked(self, message: Message, result: TrainResult, job: TrainJob) -> RecordDict:
        client_id, config = self._client(message), self.worker.config
        try:
            request = mask_request_of(message.content, config)
            assert request is not None
            start, store = job.start.for_client(client_id), self._sessions[client_id]
            return masked_reply(result, start, request, config, store)
        except Exception as error:
            return reply_of(MessageType.TRAIN, client_id, error)

    def _learn(self, clients: int, tokens: int) -> None:
        """Plan no cohort again that is as large as one that ran out of memory."""
        limits = self.limits.without(clients, tokens)
        if limits != self.limits and self.failed_file is not None:
            write_atomically(self.failed_file, f"{json.dumps(limits.failed)}\n".encode())
        self.limits = limits

    def _capability(self, client_id: str) -> Capability:
        """The worker's capability of the client, on the device that the population gives it.

        Kernels are not probed, since clients do not run on this machine.
        """
        if self.canaries is not None and client_id in self.canaries:
            return self.canaries.capability(client_id)
        capability = self.worker.capability(client_id, probed=False)
        if self.clock is None:
            return capability
        client = self.clock.population.client(client_id)
        if client.device is None:
            return capability
        return replace(capability, device=client.device_label, free_bytes=client.free_bytes or 0)


def _read_failed(file: Path | None) -> list[tuple[int, int]]:
    """Clients and tokens of the passes that failed in the run so far."""
    if file is None or not file.is_file():
        return []
    return [(int(c), int(t)) for c, t in json.loads(file.read_text(encoding="utf-8"))]
