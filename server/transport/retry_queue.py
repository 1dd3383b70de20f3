"""Retry one message until it is answered, runs out of tries or passes its deadline.

Flower reports a lost message by an error in place of the reply, or not at all: a node that is
stopped or killed, a process that dies, a reply that was not fetched in time, a node that comes back
between two polls. Of some failures the node itself says that they pass, as of a trainer that
restarts. A copy is a new message with the same records, which travel and are stored by their
content. The first reply to any copy is the reply; the other copies are not pulled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from flexlora.errors import UserError
from flexlora.server.transport.backoff import backoff
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.flower_private import (
    EXPIRED_CODES,
    LOST_CODES,
    Handed,
    set_sender,
)
from flexlora.server.transport.link import Unreachable, link_of
from flexlora.server.transport.messages import transient_cause

__all__ = ["REPORT_BYTES", "PendingMessage", "RetryPolicy", "RetryQueue"]

REPORT_BYTES = 4 * 2**20  # of a reply without factors: names and numbers
LONGEST_PAUSE_SECONDS = 30
NODE_CHECK_SECONDS = 1.0  # between two checks whether an absent node is back


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When a message is sent again, and how long each copy lives.

    Args:
        resends: copies beside the first.
        silence_seconds: without a reply for so long, a copy counts as lost; its reply still counts.
        patience_seconds: how long an absent node is waited for.
        ttl_seconds: the life of a copy; 0 is until the deadline and ``late_seconds`` beyond it.
        late_seconds: None leaves the life of a message to Flower (12 hours).
    """

    resends: int = 0
    silence_seconds: float = math.inf
    patience_seconds: float = 0.0
    ttl_seconds: float = 0.0
    late_seconds: float | None = None

    def ttl(self, left_seconds: float) -> float | None:
        """The life of a copy that is sent ``left_seconds`` before the deadline."""
        if self.ttl_seconds:
            return self.ttl_seconds
        return None if self.late_seconds is None else left_seconds + self.late_seconds


class PendingMessage:
    """A message to one node, the copies of it that were sent, and whether one was answered.

    Args:
        most_bytes: a reply beyond it is refused unread.
    """

    def __init__(self, message: Message, most_bytes: int = REPORT_BYTES) -> None:
        self.most_bytes = most_bytes
        self.handed: dict[str, Handed] = {}  # replies that are to be read, by their copy's id
        self.message: Message | None = message
        self.metadata = message.metadata
        self.node_id = message.metadata.dst_node_id
        self.open: list[str] = []  # ids of the copies that may still be answered
        self.sent = 0
        self.losses: list[str] = []  # why each further copy was needed
        self.error: Message | None = None
        self.answered = False
        self.node_absent = False  # when it was to be sent again
        self.sent_at = 0.0
        self.lost_at = 0.0
        self.due: float | None = None
        self._ids: set[str] = set()

    def has_sent(self, message_id: str) -> bool:
        """Whether ``message_id`` is one of the copies."""
        return message_id in self._ids or message_id == self.metadata.message_id != ""

    def drop_content(self) -> None:
        """Free the records: it will not be sent again."""
        self.message = None

    @property
    def note(self) -> str:
        """How often it was sent and why; empty where once was enough."""
        if self.sent > 1:
            return f"sent {self.sent} times ({', '.join(self.losses[: self.sent - 1])})"
        if not self.losses or self.open:
            return ""
        why = ", as the node was not there" if self.node_absent else ""
        return f"{self.losses[-1]}, not sent again{why}"

    def next_copy(self, node_id: int, ttl: float | None) -> Message:
        """The message itself the first time, then a new one with the same records."""
        assert self.message is not None
        if self.sent == 0:
            if ttl is not None:
                self.metadata.ttl = ttl
            return self.message
        return Message(
            self.message.content,
            dst_node_id=node_id,
            message_type=self.metadata.message_type,
            ttl=ttl,
            group_id=self.metadata.group_id,
        )

    def mark_sent(self, message_id: str | None, now: float) -> None:
        """Count one more copy; Flower gives it no id where it did not accept it."""
        self.sent, self.sent_at, self.due = self.sent + 1, now, None
        if message_id:
            self.open.append(message_id)
            self._ids.add(message_id)

    def schedule(self, loss: str, *, now: float, due: float) -> None:
        """Send it again at ``due``, because of ``loss``."""
        self.losses.append(loss)
        self.lost_at, self.due = now, due


class RetryQueue:
    """The pending messages of one exchange: sends, detects losses, sends again.

    Args:
        on_resent: called with every message that is sent again, and why.
        find_node: the id under which an absent node is back; None where it is not.
    """

    def __init__(
        self,
        grid: Grid,
        messages: Sequence[PendingMessage],
        *,
        policy: RetryPolicy,
        deadline: float,
        on_resent: Callable[[PendingMessage, str], None],
        find_node: Callable[[PendingMessage], int | None],
    ) -> None:
        self.link, self.clock, self.policy = link_of(grid), clock_of(grid), policy
        self.deadline, self.on_resent, self.find_node = deadline, on_resent, find_node
        self.waiting = dict.fromkeys(messages)

    def send_all(self) -> Iterator[PendingMessage]:
        """Send every message once; yields those that Flower did not accept and are given up."""
        yield from self._send([(pending, pending.node_id) for pending in list(self.waiting)])

    def _send(self, ready: Sequence[tuple[PendingMessage, int]]) -> Iterator[PendingMessage]:
        now = self.clock.now()
        ttl = self.policy.ttl(self.deadline - now)
        messages = [pending.next_copy(node_id, ttl) for pending, node_id in ready]
        ids, loss = self.link.push(messages, self.deadline)
        if len(ids) != len(messages):
            raise UserError(
                f"the SuperLink took {len(ids)} of {len(messages)} messages, expected all; if its "
                "log says that they are too large, lower the ranks or raise its limit."
            )
        for (pending, _), message_id in zip(ready, ids, strict=True):
            pending.mark_sent(message_id, now)
        for (pending, _), message_id in zip(ready, ids, strict=True):
            if not message_id and not self._lose_copy(pending, loss):
                yield pending

    def accept(self, pending: PendingMessage, message_id: str, reply: Message) -> bool:
        """Whether ``reply`` ends the wait for ``pending``; False where a copy was lost."""
        pending.open.remove(message_id)
        set_sender(reply, pending.node_id, message_id)
        code = reply.error.code if reply.has_error() else None
        loss = f"code {code}" if code in LOST_CODES else transient_cause(reply)
        if loss and pending in self.waiting:
            pending.error = reply
            return not self._lose_copy(pending, loss)
        if code in EXPIRED_CODES or (loss and pending.open):
            return False  # of an earlier round, in which it was counted as missing
        pending.open.clear()
        pending.answered = True
        self.waiting.pop(pending, None)
        return True

    def _lose_copy(self, pending: PendingMessage, loss: str) -> bool:
        """Whether a message that lost a copy may still be answered."""
        if pending.open or pending.due is not None:
            return True
        if pending.sent > self.policy.resends:
            del self.waiting[pending]
            return False
        now = self.clock.now()
        pending.schedule(loss, now=now, due=now + backoff(pending.sent, LONGEST_PAUSE_SECONDS))
        return True

    def resend_due(self) -> Iterator[PendingMessage]:
        """Send what is due to nodes that are connected; yields the messages given up."""
        now = self.clock.now()
        for pending in self.waiting:
            if now >= self._silent_at(pending):
                pending.schedule(f"silent for {self.policy.silence_seconds:g} s", now=now, due=now)
        due = [p for p in self.waiting if p.due is not None and p.due <= now]
        if not due:
            return
        try:
            connected, ready = self.link.node_ids(now + NODE_CHECK_SECONDS), []
        except Unreachable:
            return  # all are still due
        for pending in due:
            here = pending.node_id in connected
            node_id = pending.node_id if here else self.find_node(pending)
            pending.node_absent = node_id is None
            if node_id is not None:
                ready.append((pending, node_id))
            elif pending.open or now < pending.lost_at + self.policy.patience_seconds:
                pending.due = now + NODE_CHECK_SECONDS
            else:
                del self.waiting[pending]
                yield pending
        if ready:
            yield from self._send(ready)
            for pending, _ in ready:
                self.on_resent(pending, pending.losses[-1])

    def _silent_at(self, pending: PendingMessage) -> float:
        """When the open copies of a message will have been silent for too long."""
        if not pending.open or pending.due is not None or pending.sent > self.policy.resends:
            return math.inf
        return pending.sent_at + self.policy.silence_seconds

    @property
    def next_due(self) -> float:
        """When the next copy is to be sent if no reply comes."""
        times = [p.due if p.due is not None else self._silent_at(p) for p in self.waiting]
        return min(times, default=math.inf)
