"""A Flower ``Grid`` in one process: no SuperLink, one base, many clients in one pass.

The messages are the ones that deployment sends, encoded and decoded as there. Train messages of a
round are packed into cohorts (``cohorts.py``) and handed to a pool (``pool.py``): this process, or
several through Ray. With a world (``world.py``) replies arrive when their clients would send them.

What a client keeps to itself is a matter between it and the world, not of who shares its pass or
whose answers the server takes: all that stay to the end of their training keep what they trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from flexlora.clients.messages import (
    decode_evaluate,
    decode_train,
    encode_capability,
    encode_evaluate,
    encode_train,
)
from flexlora.clients.worker import Worker
from flexlora.lora.adapters import Adapter
from flexlora.simulations.engine.cohorts import CohortLimits, plan_cohorts
from flexlora.simulations.engine.pool import LocalPool, Pending, Pool
from flexlora.simulations.world.efforts import effort_of
from flexlora.simulations.world.simulated_time import World
from flexlora.training.personal_store import PersonalStore
from flexlora.training.uplink import Uplink, feedback_beside
from flexlora.wire.jobs import Capability, EvalJob, EvalResult, TrainJob, TrainResult

__all__ = ["InProcessGrid"]

LOST_NODE = 5  # Flower's code for a node that is gone
EVALUATED_TOGETHER = 32  # clients; a constant, so that scores do not depend on the workers


@dataclass(kw_only=True)
class _Held:
    """A message that was taken and not answered yet; its results are at ``place`` in a cohort."""

    message: Message
    server_round: int
    job: TrainJob | None = None
    cohort: Pending[Sequence[TrainResult | EvalResult]] | None = None
    place: int = 0
    since: float = 0.0  # when its client has what it keeps to itself, and whether that is put away
    put_away: bool = False

    @property
    def result(self) -> TrainResult | EvalResult:
        assert self.cohort is not None
        return self.cohort.result()[self.place]


class InProcessGrid(Grid):
    """Nodes 1 to N are the worker's clients in order; all of them have registered beforehand."""

    in_process = True  # the server is told: seconds of training are this machine's, not a client's

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
    ) -> None:
        self.worker, self.limits, self.wire_dtype = worker, limits, wire_dtype
        self.pool, self.clock, self.late_rounds = pool or LocalPool(worker), world, late_rounds
        self.personal = personal or PersonalStore()
        self.feedback = feedback_beside(self.personal)
        self._clients = dict(enumerate(worker.client_ids, start=1))
        self._held: dict[str, _Held] = {}
        self._pushed = self._round = 0
        self._met = False
        self._run = Run.create_empty(run_id=1)
        # Flower's Message reads its sender from the process it is made in.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0

    @property
    def sends_again(self) -> bool:
        """Whether a round can be sent again: its clients keep nothing from the rounds before."""
        return self.worker.personal is None and self.wire_dtype != "int8"

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """Who can be reached now; before the first round everybody, to be asked what it is."""
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
        ids, memo = [], dict[int, Adapter]()
        for message in messages:
            self._pushed += 1
            message_id = f"message-{self._pushed}"
            message.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
            kind, client_id = message.metadata.message_type, self._client(message)
            if kind == MessageType.TRAIN:
                job = decode_train(message, client_id, memo)
                self._round = max(self._round, job.server_round)
                if self._send(message, job):
                    trained[message_id] = job
            elif kind == MessageType.EVALUATE:
                evaluated[message_id] = decode_evaluate(message, client_id, memo)
                self._round = max(self._round, evaluated[message_id].server_round)
            else:
                self._met = True
            self._held[message_id] = _Held(message=message, server_round=self._round)
        self._put_away()  # before those who are asked again go on from it
        self._forget()
        if trained:
            self._submit(trained)
        self._submit_evaluations(evaluated)
        return ids

    def _send(self, message: Message, job: TrainJob) -> bool:
        """Whether the client will answer; on a simulated clock it may leave before."""
        if self.clock is None:
            return True
        effort = effort_of(
            job,
            self.worker,
            wire_dtype=self.wire_dtype,
            bytes_down=_array_bytes(message.content),
        )
        return self.clock.send(message.metadata.message_id, effort)

    @property
    def _oldest(self) -> int:
        """The first round whose answers may still be asked for."""
        return self._round - self.late_rounds

    def _put_away(self) -> None:
        """What is trained out there is its client's own, whether or not its answer is taken."""
        if self.worker.personal is not None:
            for held in self._held.values():
                self._keep(held)

    def _keep(self, held: _Held) -> None:
        if held.job is not None and not held.put_away:
            result = held.result
            assert isinstance(result, TrainResult)
            self.personal.keep([result], [held.job], since=held.since)
            held.put_away = True

    def _forget(self) -> None:
        """Whatever is held of rounds so old that nobody pulls their answers any more."""
        old = [key for key, held in self._held.items() if held.server_round < self._oldest]
        for message_id in old:
            del self._held[message_id]
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
            for k, (key, job) in enumerate(zip(keys, attached, strict=True)):
                self._hold(key, cohort, k, job)

    def _submit_evaluations(self, jobs: dict[str, EvalJob]) -> None:
        keys = list(jobs)
        for at in range(0, len(keys), EVALUATED_TOGETHER):
            group = keys[at : at + EVALUATED_TOGETHER]
            now = math.inf if self.clock is None else self.clock.now()
            attached = self.personal.attach_eval([jobs[key] for key in group], now=now)
            cohort = self.pool.evaluate(attached)
            for k, key in enumerate(group):
                self._hold(key, cohort, k)

    def _hold(
        self,
        message_id: str,
        cohort: Pending[Sequence[TrainResult | EvalResult]],
        place: int,
        job: TrainJob | None = None,
    ) -> None:
        held = self._held[message_id]
        held.cohort, held.place, held.job = cohort, place, job
        if job is not None and self.clock is not None:
            held.since = self.clock.arrives(message_id)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to ``message_ids`` that have arrived, each given once; answering happens here."""
        if self._leaves_some:
            self._put_away()  # a run that is resumed finds what nobody asked for, too
        replies = []
        for message_id in message_ids:
            if message_id in self._held and self._arrived(message_id):
                replies.append(self._answer(self._held.pop(message_id), message_id))
        return replies

    @property
    def _leaves_some(self) -> bool:
        """Whether trainings may end whose answers nobody takes."""
        return self.clock is not None or self.worker.config.server.over_selection > 0

    def _arrived(self, message_id: str) -> bool:
        return self.clock is None or self.clock.arrived(message_id)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _client(self, message: Message) -> str:
        return self._clients[message.metadata.dst_node_id]

    def _answer(self, held: _Held, message_id: str) -> Message:
        message, job = held.message, held.job
        lost = self.clock.take(message_id) if self.clock is not None else ""
        if lost:
            return Message(Error(code=LOST_NODE, reason=lost), reply_to=message)
        if held.cohort is None:
            return encode_capability(self._capability(self._client(message)), reply_to=message)
        result = held.result
        if isinstance(result, EvalResult):
            return encode_evaluate(result, reply_to=message)
        assert job is not None
        self._keep(held)
        uplink = Uplink.of(self.worker.config, self.feedback, dtype=self.wire_dtype)
        return encode_train(
            uplink.ready(result, job),
            dtype=self.wire_dtype,
            reply_to=message,
            start=job.start.for_client(job.client_id),
        )

    def _capability(self, client_id: str) -> Capability:
        """What the worker says of the client, on the device that the population gives it.

        Nobody asks what kernels this machine runs: it is none of the clients' machines.
        """
        own = self.worker.capability(client_id, probed=False)
        if self.clock is None:
            return own
        client = self.clock.population.client(client_id)
        if client.device is None:
            return own
        return replace(own, device=client.device_label, free_bytes=client.free_bytes)


def _array_bytes(content: RecordDict) -> int:
    return sum(
        len(array.data) for record in content.array_records.values() for array in record.values()
    )
