"""Messages that may still be answered after their round, and how a resumed simulation resends them.

On a simulated clock a client's reply is a function of the seed, of the message and of the moment it
was sent. So a checkpoint holds no replies. For every round from which replies may still come it
holds the state that was sent, the clients that were asked, and the moment. A resumed run sends the
whole round again from there, so that cohorts are the same, and waits for the missing replies only.

    checkpoint/sent-000003/           round 3 as it was sent
    notes: {"under_way": {"3": [client ids]}, "simulated_now": seconds, "busy_until": {...}}
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from flexlora.aggregation.engine.starts import Start
from flexlora.aggregation.engine.state import State
from flexlora.runs.checkpoints import kept_rounds, load_checkpoint, load_notes
from flexlora.runs.folder import RunFolder
from flexlora.server.members.roster import Member, Roster
from flexlora.server.rounds.round_plan import RoundPlan
from flexlora.server.transport.clocks import Clock, Spent, clock_of, clock_state, restore_clock
from flexlora.server.transport.exchange import send
from flexlora.server.transport.retry_queue import PendingMessage

__all__ = ["LateMessage", "LateMessages"]


@dataclass(frozen=True, kw_only=True)
class LateMessage:
    """A message that was not answered in its round; ``spent`` is what its training takes."""

    pending: PendingMessage
    client_id: str
    server_round: int
    start: Start
    spent: Spent | None

    @property
    def start_name(self) -> str:
        """The start's name among those of a later round."""
        return f"{self.start.rank_class.name}@{self.server_round}"


@dataclass(frozen=True, kw_only=True)
class _SentRound:
    """A round as it was sent: the state before it, the members asked, the moment."""

    state: State
    members: Sequence[Member]
    moment: Mapping[str, Any]


class LateMessages:
    """Messages of the last ``late_rounds`` rounds that may still be answered, each once."""

    def __init__(self, late_rounds: int) -> None:
        self.late_rounds = late_rounds
        self._late: dict[PendingMessage, LateMessage] = {}
        self._sent_round: _SentRound | None = None  # the open round
        self._written: set[int] = set()

    @property
    def pending(self) -> list[PendingMessage]:
        return list(self._late)

    @property
    def starts(self) -> dict[str, Start]:
        """By ``start_name``, for the method to subtract."""
        return {late.start_name: late.start for late in self._late.values()}

    def pop(self, message_id: str) -> LateMessage | None:
        """The message of which ``message_id`` is a copy; from now on it counts as answered."""
        pending = next((p for p in self._late if p.has_sent(message_id)), None)
        return self._late.pop(pending) if pending is not None else None

    def open_round(self, state: State, members: Sequence[Member], clock: Clock) -> None:
        """Note a round that can be sent again after a resume."""
        moment = clock_state(clock)
        self._sent_round = _SentRound(state=state, members=members, moment=moment)

    def close_round(
        self, plan: RoundPlan, clock: Clock, client_ids: Sequence[str] | None = None
    ) -> None:
        """Add the unanswered messages of ``plan`` (of ``client_ids`` only), drop those too old.

        The clock is read here, since it knows a client's last training only: when the late reply
        comes, the client may have been sent another message.
        """
        for pending, client_id in plan.pending.items():
            if pending.open and (client_ids is None or client_id in client_ids):
                self._late[pending] = LateMessage(
                    pending=pending,
                    client_id=client_id,
                    server_round=plan.server_round,
                    start=plan.sent[plan.asked[client_id]],
                    spent=clock.spent(client_id),
                )
        oldest = plan.server_round + 1 - self.late_rounds
        self._late = {p: late for p, late in self._late.items() if late.server_round >= oldest}

    def write(self, run: RunFolder) -> dict[str, list[str]]:
        """Before a checkpoint: write the closed round if replies may still come.

        Returns the clients of whom they may, by round, for the checkpoint's notes.
        """
        late = [late for late in self._late.values() if late.pending.open]
        sent, self._sent_round = self._sent_round, None
        if sent is not None and any(one.server_round == sent.state.round + 1 for one in late):
            folder = _folder(run, sent.state.round + 1)
            classes = {member.capability.client_id: member.rank_class for member in sent.members}
            run.save_checkpoint(folder, sent.state, classes, sent.moment)
            self._written.add(sent.state.round + 1)
        waited: dict[str, list[str]] = {}
        for one in late:
            if one.server_round in self._written:
                waited.setdefault(str(one.server_round), []).append(one.client_id)
        return waited

    @staticmethod
    def remove_unneeded(run: RunFolder) -> None:
        """After a checkpoint: remove the rounds that none of those kept waits for."""
        notes = (load_notes(run.checkpoint, at) for at in kept_rounds(run.checkpoint)[:-1])
        needed = {
            _folder(run, int(server_round))
            for kept in (*notes, run.load_notes())
            for server_round in kept.get("under_way", {})
        }
        for folder in set(run.checkpoint.glob("sent-*")) - needed:
            shutil.rmtree(folder, ignore_errors=True)  # tried again after the next round

    def send_again(
        self,
        run: RunFolder,
        waited: Mapping[str, Sequence[str]],
        grid: Grid,
        roster: Roster,
        plan_of: Callable[[State, Sequence[Member], int], RoundPlan],
    ) -> None:
        """Send the rounds in ``waited`` again, each from its state and at its moment.

        Raises:
            UserError: the files of such a round are damaged.
        """
        clock = clock_of(grid)
        for server_round in sorted(map(int, waited)):
            folder = _folder(run, server_round)
            state, classes = load_checkpoint(folder)
            members = [
                replace(roster.members[name], rank_class=rank_class)
                for name, rank_class in classes.items()
                if name in roster.members
            ]
            restore_clock(load_notes(folder), clock)
            plan = plan_of(state, members, server_round)
            send(grid, plan.pending)
            self.close_round(plan, clock, waited[str(server_round)])
            self._written.add(server_round)


def _folder(run: RunFolder, server_round: int) -> Path:
    return run.checkpoint / f"sent-{server_round:06d}"
