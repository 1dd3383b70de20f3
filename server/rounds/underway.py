"""What is on its way when a round closes, and how a resumed simulation sends it again.

On a simulated clock what clients do in a round is a function of the seed, of what they are sent and
of when. So the checkpoint holds no replies: of every round from which replies may still come it
holds the state that was sent, to whom, and the moment. The whole round is sent again from there,
so that cohorts are those of the first time, and only who had not answered is waited for.

    checkpoint/sent-000003/           round 3 as it went out
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
from flexlora.lora.ranks import RankClass
from flexlora.runs.checkpoints import load_checkpoint, load_notes
from flexlora.runs.folder import RunFolder
from flexlora.server.members.roster import Member, Roster
from flexlora.server.rounds.intake import Overdue, OverdueBook
from flexlora.server.rounds.opening import Opening
from flexlora.server.transport.clocks import Clock, Spent, clock_of
from flexlora.server.transport.exchange import send
from flexlora.server.transport.resending import Letter

__all__ = ["UnderWay", "moment_of", "return_to", "unanswered"]


def moment_of(clock: Clock) -> dict[str, Any]:
    """What a simulated clock must be told to go on from now; nothing of the wall's."""
    if not clock.simulated:
        return {}
    busy = {name: until for name, until in clock.busy_until.items() if until > clock.now()}
    return {"simulated_now": clock.now(), "busy_until": busy}


def return_to(moment: Mapping[str, Any], clock: Clock) -> None:
    """Set the clock to ``moment``, where there is one."""
    if moment.get("simulated_now") is not None:
        clock.set(moment["simulated_now"])
        clock.busy_until.clear()
        clock.busy_until.update(moment.get("busy_until", {}))


def unanswered(
    letters: Mapping[Letter, str], starts: Mapping[str, Start], server_round: int
) -> list[Overdue]:
    """Those of ``letters``, by client, that are still open; ``starts`` is what each client got."""
    return [
        Overdue(
            letter=letter, client_id=client_id, server_round=server_round, start=starts[client_id]
        )
        for letter, client_id in letters.items()
        if letter.open
    ]


@dataclass(frozen=True, kw_only=True)
class _Sending:
    """A round as it went out: the state before it, whom it asked in which class, the moment."""

    state: State
    rank_classes: Mapping[str, RankClass]
    moment: Mapping[str, Any]


class UnderWay:
    """The ``book`` of overdue letters, what each took out there, and the rounds they are of."""

    def __init__(self, book: OverdueBook) -> None:
        self.book = book
        self._late: dict[Letter, tuple[Overdue, Spent | None]] = {}
        self._sending: _Sending | None = None  # of the round that is open
        self._written: set[int] = set()

    def opened(self, state: State, asked: Sequence[Member], clock: Clock) -> None:
        """The round after ``state`` goes out now, and could be sent again."""
        classes = {member.capability.client_id: member.rank_class for member in asked}
        self._sending = _Sending(state=state, rank_classes=classes, moment=moment_of(clock))

    def keep(self, late: Sequence[Overdue], server_round: int, clock: Clock) -> None:
        """After ``server_round``: take in ``late``, forget what is too old for the next round.

        The clock is asked now, as it remembers a client's last training alone: by the time of a
        late reply the client may have been sent another.
        """
        self.book.keep(late, server_round)
        held = self._late | {own.letter: (own, clock.spent(own.client_id)) for own in late}
        self._late = {letter: held[letter] for letter in self.book.letters}

    def spent(self, overdue: Overdue) -> Spent | None:
        """What it took to answer; None where no clock knows."""
        return self._late[overdue.letter][1]

    def write(self, run: RunFolder) -> dict[str, list[str]]:
        """Before a checkpoint: the closed round, if it is waited for; who is, for the notes."""
        sending, self._sending = self._sending, None
        closed = sending.state.round + 1 if sending is not None else 0
        late = [own for own, _ in self._late.values() if own.letter.open]
        if sending is not None and any(own.server_round == closed for own in late):
            folder = _folder(run, closed)
            run.save_checkpoint(folder, sending.state, sending.rank_classes, sending.moment)
            self._written.add(closed)
        waited: dict[str, list[str]] = {}
        for own in late:
            if own.server_round in self._written:
                waited.setdefault(str(own.server_round), []).append(own.client_id)
        return waited

    def tidy(self, run: RunFolder, waited: Mapping[str, Sequence[str]]) -> None:
        """After a checkpoint: remove the rounds that nobody waits for any more."""
        needed = {_folder(run, int(server_round)) for server_round in waited}
        for folder in set(run.checkpoint.glob("sent-*")) - needed:
            shutil.rmtree(folder, ignore_errors=True)  # tried again after the next round

    def send_again(
        self,
        run: RunFolder,
        waited: Mapping[str, Sequence[str]],
        grid: Grid,
        roster: Roster,
        *,
        opening: Callable[[State, Sequence[Member], int], Opening],
    ) -> None:
        """Send the rounds that were ``waited`` for as they went out, each at its moment.

        Raises:
            UserError: what was written of them is damaged.
        """
        clock = clock_of(grid)
        for server_round in sorted(map(int, waited)):
            folder = _folder(run, server_round)
            state, classes = load_checkpoint(folder)
            members = [
                replace(roster.members[name], rank_class=own)
                for name, own in classes.items()
                if name in roster.members
            ]
            return_to(load_notes(folder), clock)
            opened = opening(state, members, server_round)
            letters = {Letter(message): name for name, message in opened.messages().items()}
            send(grid, letters)
            starts = {name: opened.sent[own] for name, own in opened.asked.items()}
            late = unanswered(letters, starts, server_round)
            here = [own for own in late if own.client_id in waited[str(server_round)]]
            self.keep(here, server_round, clock)
            self._written.add(server_round)


def _folder(run: RunFolder, server_round: int) -> Path:
    return run.checkpoint / f"sent-{server_round:06d}"
