"""Letters: one message to one node, sent again until it is answered, given up or out of time.

Flower tells of a message that is lost by an error in place of the reply, or not at all: a node that
is stopped or killed, a process that dies, a reply that was not fetched in time, a node that comes
back between two polls. A copy is a new message with the same records, which travel and are stored
by their content. The first reply to any copy is the reply; the other copies are not asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from flexlora.errors import UserError
from flexlora.server.transport.clocks import clock_of

__all__ = ["LOST", "Letter", "Post", "Resending"]

EXPIRED = frozenset({ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE})
LOST = EXPIRED | {ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED}
# All other codes are the client's own failure, which a second copy would only repeat.
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
LOOK_SECONDS = 1.0  # between two looks whether a node is there again


@dataclass(frozen=True, kw_only=True)
class Resending:
    """When a message is sent again, and how long each copy lives.

    Args:
        resends: copies beside the first.
        silence_seconds: without a reply for so long, a copy counts as lost; its reply still counts.
        patience_seconds: how long a node that has gone is waited for.
        ttl_seconds: the life of a copy; 0 is until the deadline and ``late_seconds`` beyond it.
        late_seconds: None leaves the life of a message to Flower (12 hours).
    """

    resends: int = 0
    silence_seconds: float = math.inf
    patience_seconds: float = 0.0
    ttl_seconds: float = 0.0
    late_seconds: float | None = None

    def ttl(self, left_seconds: float) -> float | None:
        """The life of a copy that goes out ``left_seconds`` before the deadline."""
        if self.ttl_seconds:
            return self.ttl_seconds
        return None if self.late_seconds is None else left_seconds + self.late_seconds

    @staticmethod
    def pause(copies: int) -> float:
        """Seconds to wait after so many lost copies: 1, 2, 4 ..."""
        return min(LONGEST_PAUSE_SECONDS, PAUSE_SECONDS * 2.0 ** (copies - 1))


class Letter:
    """A message, the copies of it that went out, and what became of them."""

    def __init__(self, message: Message) -> None:
        self.message: Message | None = message
        self.metadata = message.metadata
        self.node_id = message.metadata.dst_node_id
        self.open: list[str] = []  # copies that may still be answered
        self.sent = 0
        self.troubles: list[str] = []  # why each further copy was needed
        self.error: Message | None = None
        self.answered = False
        self.absent = False  # its node, when it was to be sent again
        self.sent_at = 0.0
        self.lost_at = 0.0
        self.due: float | None = None
        self._ids: set[str] = set()

    def wrote(self, message_id: str) -> bool:
        """Whether ``message_id`` is one of the copies."""
        return message_id in self._ids or message_id == self.metadata.message_id != ""

    def forget(self) -> None:
        """Let go of the records: it will not be sent again."""
        self.message = None

    @property
    def story(self) -> str:
        """How often it was sent and why; empty where once was enough."""
        if self.sent > 1:
            return f"sent {self.sent} times ({', '.join(self.troubles[: self.sent - 1])})"
        if not self.troubles or self.open:
            return ""
        why = ", as the node was not there" if self.absent else ""
        return f"{self.troubles[-1]}, not sent again{why}"

    def copy(self, node_id: int, ttl: float | None) -> Message:
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

    def posted(self, message_id: str | None, now: float) -> None:
        self.sent, self.sent_at, self.due = self.sent + 1, now, None
        if message_id:
            self.open.append(message_id)
            self._ids.add(message_id)

    def plan(self, trouble: str, *, now: float, due: float) -> None:
        """Send it again at ``due``, because of ``trouble``."""
        self.troubles.append(trouble)
        self.lost_at, self.due = now, due


class Post:
    """The letters of one exchange: what is on its way, what is lost, what goes out again.

    Args:
        told: called with every letter that is sent again, and why.
        forward: where a letter's node is now, if under another id; None where nobody knows.
    """

    def __init__(
        self,
        grid: Grid,
        letters: Sequence[Letter],
        *,
        resending: Resending,
        deadline: float,
        told: Callable[[Letter, str], None],
        forward: Callable[[Letter], int | None],
    ) -> None:
        self.grid, self.clock, self.resending = grid, clock_of(grid), resending
        self.deadline, self.told, self.forward = deadline, told, forward
        self.waiting = dict.fromkeys(letters)

    def begin(self) -> Iterator[Letter]:
        """Send every letter once; those that nobody takes are given up, or sent again later."""
        letters = list(self.waiting)
        yield from self._send([(letter, letter.node_id) for letter in letters])

    def _send(self, ready: Sequence[tuple[Letter, int]]) -> Iterator[Letter]:
        now = self.clock.now()
        ttl = self.resending.ttl(self.deadline - now)
        messages = [letter.copy(node_id, ttl) for letter, node_id in ready]
        trouble = "no such node"  # Flower gives no id to a message for one that it has forgotten
        try:
            ids = list(self.grid.push_messages(messages))
        except ObjectPushError:
            # A slow SuperLink may refuse records that it took when they came the first time.
            ids, trouble = [None] * len(messages), "its upload broke off"
        if len(ids) != len(messages):
            raise UserError(
                f"the SuperLink took {len(ids)} of {len(messages)} messages, expected all; if its "
                "log says that they are too large, lower the ranks or raise its limit."
            )
        for (letter, _), message_id in zip(ready, ids, strict=True):
            letter.posted(message_id, now)
        for (letter, _), message_id in zip(ready, ids, strict=True):
            if not message_id and not self._lose(letter, trouble):
                yield letter

    def take(self, letter: Letter, message_id: str, reply: Message) -> bool:
        """Whether ``reply`` is what became of the letter; False for a copy that was lost."""
        letter.open.remove(message_id)
        # Flower's own error replies (node lost, message expired) name the SuperLink.
        reply.metadata.__dict__["_src_node_id"] = letter.node_id
        reply.metadata.__dict__["_reply_to_message_id"] = message_id
        code = reply.error.code if reply.has_error() else None
        if code in LOST and letter in self.waiting:
            letter.error = reply
            return not self._lose(letter, f"code {code}")
        if code in EXPIRED or (code in LOST and letter.open):
            return False  # of an earlier round, in which it was counted as missing
        letter.open.clear()
        letter.answered = True
        self.waiting.pop(letter, None)
        return True

    def _lose(self, letter: Letter, trouble: str) -> bool:
        """Whether a letter that lost a copy may still be answered."""
        if letter.open or letter.due is not None:
            return True
        if letter.sent > self.resending.resends:
            del self.waiting[letter]
            return False
        now = self.clock.now()
        letter.plan(trouble, now=now, due=now + self.resending.pause(letter.sent))
        return True

    def resend(self) -> Iterator[Letter]:
        """Send what is due to nodes that are there; those given up are handed back."""
        now = self.clock.now()
        for letter in self.waiting:
            if now >= self._silent_at(letter):
                letter.plan(f"silent for {self.resending.silence_seconds:g} s", now=now, due=now)
        due = [letter for letter in self.waiting if letter.due is not None and letter.due <= now]
        if not due:
            return
        here, ready = set(self.grid.get_node_ids()), []
        for letter in due:
            node_id = letter.node_id if letter.node_id in here else self.forward(letter)
            letter.absent = node_id is None
            if node_id is not None:
                ready.append((letter, node_id))
            elif letter.open or now < letter.lost_at + self.resending.patience_seconds:
                letter.due = now + LOOK_SECONDS
            else:
                del self.waiting[letter]
                yield letter
        if ready:
            yield from self._send(ready)
            for letter, _ in ready:
                self.told(letter, letter.troubles[-1])

    def _silent_at(self, letter: Letter) -> float:
        """When a letter that is on its way will have been silent for too long."""
        if not letter.open or letter.due is not None or letter.sent > self.resending.resends:
            return math.inf
        return letter.sent_at + self.resending.silence_seconds

    @property
    def next_due(self) -> float:
        """When something is to be sent next if no reply comes."""
        times = [
            letter.due if letter.due is not None else self._silent_at(letter)
            for letter in self.waiting
        ]
        return min(times, default=math.inf)
