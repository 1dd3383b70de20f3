"""A Flower ``Grid`` in one process: no Ray, no SuperLink, one base, many clients in one pass.

The messages are the ones that deployment sends, encoded and decoded as there. Train messages of a
round are packed into cohorts; a cohort is trained when the first of its replies is pulled, so that
only one cohort's factors are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flexlora.clients.messages import (
    decode_evaluate,
    decode_train,
    encode_capability,
    encode_evaluate,
    encode_train,
)
from flexlora.clients.worker import Worker
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from flexlora.adapters import Adapter
from flexlora.jobs import TrainJob

__all__ = ["InProcessGrid", "plan_cohorts"]


def plan_cohorts(
    jobs: dict[str, TrainJob], size: int, pass_key: Callable[[str], str] = lambda _: ""
) -> list[list[str]]:
    """Message ids in cohorts of at most ``size``: alike ranks together, then by client id.

    Clients with another ``pass_key`` (another base) are never in one cohort. The plan is a function
    of the round's clients, their bases and ranks only, never of arrival or timing.
    """
    order = sorted(jobs, key=lambda key: (jobs[key].start.rank_class.rank, jobs[key].client_id))
    groups: dict[str, list[str]] = {}
    for key in order:
        groups.setdefault(pass_key(jobs[key].client_id), []).append(key)
    return [
        group[at : at + size]
        for _, group in sorted(groups.items())
        for at in range(0, len(group), size)
    ]


class InProcessGrid(Grid):
    """Nodes 1 to N are the worker's clients in order; ``cohort_size`` of them train in one pass."""

    def __init__(self, worker: Worker, *, cohort_size: int, wire_dtype: str) -> None:
        self.worker, self.cohort_size, self.wire_dtype = worker, cohort_size, wire_dtype
        self._clients = dict(enumerate(worker.client_ids, start=1))
        self._messages: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._cohorts: dict[str, list[str]] = {}
        self._pushed = 0
        self._run = Run.create_empty(run_id=1)
        # Flower's Message reads its sender from the process it is made in.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        return list(self._clients)

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
        """Take the messages and plan the cohorts; nothing is trained yet."""
        ids, jobs = [], {}
        memo: dict[int, Adapter] = {}
        evaluations = []
        for message in messages:
            self._pushed += 1
            message_id = f"message-{self._pushed}"
            message.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
            self._messages[message_id] = message
            if message.metadata.message_type == MessageType.TRAIN:
                jobs[message_id] = decode_train(message, self._client(message), memo)
            elif message.metadata.message_type == MessageType.EVALUATE:
                evaluations.append(message_id)
        for cohort in plan_cohorts(jobs, self.cohort_size, lambda c: self.worker.pass_key(c)):
            self._cohorts |= dict.fromkeys(cohort, cohort)
        self._cohorts |= dict.fromkeys(evaluations, evaluations)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to ``message_ids``, each given once; answering happens here."""
        replies = []
        for message_id in message_ids:
            if message_id in self._messages:
                self._answer(message_id)
            if message_id in self._replies:
                replies.append(self._replies.pop(message_id))
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _client(self, message: Message) -> str:
        return self._clients[message.metadata.dst_node_id]

    def _answer(self, message_id: str) -> None:
        """Answer this message and all of its cohort."""
        cohort = self._cohorts.get(message_id, [message_id])
        messages = {key: self._messages.pop(key) for key in cohort}
        kind = messages[message_id].metadata.message_type
        answers = {
            MessageType.QUERY: self._query,
            MessageType.TRAIN: self._train,
            MessageType.EVALUATE: self._evaluate,
        }
        for key, reply in zip(messages, answers[kind](list(messages.values())), strict=True):
            self._cohorts.pop(key, None)
            self._replies[key] = reply

    def _query(self, messages: list[Message]) -> list[Message]:
        return [
            encode_capability(self.worker.capability(self._client(m)), reply_to=m) for m in messages
        ]

    def _train(self, messages: list[Message]) -> list[Message]:
        memo: dict[int, Adapter] = {}
        jobs = [decode_train(message, self._client(message), memo) for message in messages]
        return [
            encode_train(
                result, dtype=self.wire_dtype, reply_to=message, trainable=job.start.trainable
            )
            for result, job, message in zip(self.worker.train(jobs), jobs, messages, strict=True)
        ]

    def _evaluate(self, messages: list[Message]) -> list[Message]:
        memo: dict[int, Adapter] = {}
        jobs = [decode_evaluate(message, self._client(message), memo) for message in messages]
        return [
            encode_evaluate(result, reply_to=message)
            for result, message in zip(self.worker.evaluate(jobs), messages, strict=True)
        ]
