"""A Flower ``Grid`` in one process: no SuperLink, one base, many clients in one pass.

The messages are the ones that deployment sends, encoded and decoded as there. Train messages of a
round are packed into cohorts (``cohorts.py``) and handed to a pool (``pool.py``): this process, or
several through Ray. With a world (``world.py``) replies arrive when their clients would send them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from flexlora.clients.messages import (
    decode_evaluate,
    decode_train,
    encode_capability,
    encode_evaluate,
    encode_train,
)
from flexlora.clients.worker import Worker
from flexlora.simulations.cohorts import CohortLimits, plan_cohorts
from flexlora.simulations.pool import LocalPool, Pending, Pool
from flexlora.simulations.world import Effort, World
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from flexlora.adapters import Adapter
from flexlora.jobs import Capability, EvalJob, EvalResult, TrainJob, TrainResult
from flexlora.personal_store import PersonalStore
from flexlora.schedule import num_steps, padded_tokens
from flexlora.uplink import Uplink, feedback_beside
from flexlora.wire import encoded_bytes

__all__ = ["InProcessGrid"]

LOST_NODE = 5  # Flower's code for a node that is gone
EVALUATED_TOGETHER = 32  # clients; a constant, so that scores do not depend on the workers


class _Cohort:
    """Results to come; what its clients keep to themselves is put away when they first come."""

    def __init__(
        self, pending: Pending, jobs: Sequence[TrainJob] = (), personal: PersonalStore | None = None
    ) -> None:
        self.pending, self.jobs, self.personal = pending, jobs, personal

    def results(self) -> Sequence[TrainResult | EvalResult]:
        results = self.pending.result()
        if self.personal is not None:
            self.personal.keep(results, self.jobs)
            self.personal, self.jobs = None, ()
        return results


class InProcessGrid(Grid):
    """Nodes 1 to N are the worker's clients in order; all of them have registered beforehand."""

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
        self._messages: dict[str, Message] = {}
        self._answers: dict[str, tuple[_Cohort, int]] = {}  # and the place in it
        self._jobs: dict[str, TrainJob] = {}
        self._pushed = 0
        self._met = False
        self._run = Run.create_empty(run_id=1)
        # Flower's Message reads its sender from the process it is made in.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0

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
            self._messages[message_id] = message
            kind, client_id = message.metadata.message_type, self._client(message)
            if kind == MessageType.TRAIN:
                job = decode_train(message, client_id, memo)
                if self._send(message, job):
                    trained[message_id] = job
            elif kind == MessageType.EVALUATE:
                evaluated[message_id] = decode_evaluate(message, client_id, memo)
            else:
                self._met = True
        if trained:
            self._forget(min(job.server_round for job in trained.values()))
            self._submit(trained)
        self._submit_evaluations(evaluated)
        return ids

    def _send(self, message: Message, job: TrainJob) -> bool:
        """Whether the client will answer; on a simulated clock it may leave before."""
        if self.clock is None:
            return True
        rows, start = self.worker.train_rows(job), job.start
        effort = Effort(
            client_id=job.client_id,
            server_round=job.server_round,
            rank_class=job.start.rank_class,
            quantization=self.worker.quantization_of(job.client_id),
            tokens=padded_tokens(job, rows, self.worker.settings) if rows else 0,
            steps=num_steps(len(rows), self.worker.settings) if rows else 0,
            bytes_down=_array_bytes(message.content),
            bytes_up=encoded_bytes(start.trained, self.wire_dtype, start.trainable),
        )
        return self.clock.send(message.metadata.message_id, effort)

    def _forget(self, server_round: int) -> None:
        """Messages of rounds so old that nobody pulls their answers any more."""
        oldest = server_round - self.late_rounds
        for key in [key for key, job in self._jobs.items() if job.server_round < oldest]:
            for held in (self._jobs, self._answers, self._messages):
                held.pop(key, None)

    def _submit(self, jobs: dict[str, TrainJob]) -> None:
        cohorts = plan_cohorts(
            jobs,
            self.limits,
            rows=lambda client_id: self.worker.data.examples(client_id, "train"),
            batch_size=self.worker.settings.per_device_train_batch_size,
            pass_key=self.worker.pass_key,
        )
        self._jobs |= jobs
        for keys in cohorts:
            attached = self.personal.attach([jobs[key] for key in keys])
            cohort = _Cohort(self.pool.train(attached), attached, self.personal)
            self._answers |= {key: (cohort, k) for k, key in enumerate(keys)}

    def _submit_evaluations(self, jobs: dict[str, EvalJob]) -> None:
        keys = list(jobs)
        for at in range(0, len(keys), EVALUATED_TOGETHER):
            group = keys[at : at + EVALUATED_TOGETHER]
            attached = self.personal.attach_eval([jobs[key] for key in group])
            cohort = _Cohort(self.pool.evaluate(attached))
            self._answers |= {key: (cohort, k) for k, key in enumerate(group)}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to ``message_ids`` that have arrived, each given once; answering happens here."""
        replies = []
        for message_id in message_ids:
            if message_id in self._messages and self._arrived(message_id):
                replies.append(self._answer(self._messages.pop(message_id), message_id))
        return replies

    def _arrived(self, message_id: str) -> bool:
        return self.clock is None or self.clock.arrived(message_id)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _client(self, message: Message) -> str:
        return self._clients[message.metadata.dst_node_id]

    def _answer(self, message: Message, message_id: str) -> Message:
        lost = self.clock.take(message_id) if self.clock is not None else ""
        if lost:
            return Message(Error(code=LOST_NODE, reason=lost), reply_to=message)
        if message_id not in self._answers:
            return encode_capability(self._capability(self._client(message)), reply_to=message)
        cohort, place = self._answers.pop(message_id)
        result = cohort.results()[place]
        if isinstance(result, EvalResult):
            return encode_evaluate(result, reply_to=message)
        job = self._jobs.pop(message_id)
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
