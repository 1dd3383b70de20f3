"""What a round takes in: each reply decoded, checked against what its client was sent, folded in.

A reply that comes after its round has closed still counts, a round or so later: it names the start
that it was trained from, and that start, not this round's, is what a residual form subtracts. Its
examples count ``late_weight`` times for every round that it is late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message

from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.starts import Start
from flexlora.aggregation.engine.updates import Update, check_update
from flexlora.errors import UpdateRefused
from flexlora.lora.ranks import RankClass
from flexlora.server.members.roster import Member
from flexlora.server.rounds.ledger import RoundLedger
from flexlora.server.transport.messages import content_bytes, decode_train
from flexlora.server.transport.resending import Letter
from flexlora.wire.jobs import TrainResult

__all__ = ["Intake", "Overdue", "OverdueBook"]


@dataclass(frozen=True, kw_only=True)
class Overdue:
    """A letter that was not answered in its round, and what was in it."""

    letter: Letter
    client_id: str
    server_round: int
    start: Start

    @property
    def name(self) -> str:
        """The start's name among those of a later round."""
        return f"{self.start.rank_class.name}@{self.server_round}"


class OverdueBook:
    """Letters of earlier rounds that may still be answered, each once."""

    def __init__(self, late_rounds: int) -> None:
        self.late_rounds = late_rounds
        self._open: list[Overdue] = []

    @property
    def letters(self) -> list[Letter]:
        return [overdue.letter for overdue in self._open]

    @property
    def starts(self) -> dict[str, Start]:
        return {overdue.name: overdue.start for overdue in self._open}

    def take(self, message_id: str) -> Overdue | None:
        """The letter that ``message_id`` is a copy of; from now on it is answered."""
        for overdue in self._open:
            if overdue.letter.wrote(message_id):
                self._open.remove(overdue)
                return overdue
        return None

    def keep(self, more: Iterable[Overdue], server_round: int) -> None:
        """After ``server_round``: take in ``more``, forget what is too old for the next round."""
        oldest = server_round + 1 - self.late_rounds
        self._open = [late for late in (*self._open, *more) if late.server_round >= oldest]


@dataclass(kw_only=True)
class Intake:
    """One open round and its rows; ``tell`` is called with each client and its cause, if any.

    ``lowered`` collects the clients that came back at a lower rank than they were sent. What is
    noted beside a cause, as the copies that were sent, is in the row alone.
    """

    opened: OpenRound
    sent: Mapping[str, Start]
    class_bytes: Mapping[str, int]
    ledger: RoundLedger
    max_norm: float
    tell: Callable[[str, str], None]
    late_weight: float = 1.0
    lowered: dict[str, RankClass] = field(default_factory=dict)
    counted: int = 0  # updates of this round in the sum
    late: int = 0  # updates of earlier rounds in it

    def take(
        self,
        member: Member,
        reply: Message,
        overdue: Overdue | None = None,
        *,
        letter: Letter | None = None,
    ) -> None:
        """Fold in one reply, to ``letter``; the row of ``clients.csv`` says what became of it."""
        client_id, name = member.capability.client_id, member.rank_class.name
        start = self.sent[overdue.name if overdue is not None else name].for_client(client_id)
        result, status, cause = None, "ok", ""
        try:
            result = decode_train(reply, start)
            if result.adapter is None or result.cause:
                status, cause = "failed", result.cause or "the reply holds no factors"
                self._lower(member, result.asked_rank)
            else:
                self._fold_in(member, start, result, overdue)
                cause = result.note
        except UpdateRefused as error:
            status, cause = ("failed" if result is None else "refused"), str(error)
        if overdue is not None:
            late = f"late: trained from round {overdue.start.base_round}"
            cause = f"{late}; {cause}" if cause else late
        elif status != "ok":
            self.opened.skip(client_id)
        bytes_up = content_bytes(reply.content) if result is not None else 0
        note, copies = self._copies(letter) if overdue is None else ("", 0)
        if overdue is not None and status == "ok":
            note = self._weighed(overdue)
        told = cause, note
        self._record(member, status, told, result, bytes_up=bytes_up, copies=copies)

    def missing(self, member: Member, cause: str, *, letter: Letter | None = None) -> None:
        """A client that sent nothing at all."""
        self._none(member, "failed", cause, letter)

    def unneeded(self, member: Member, cause: str, *, letter: Letter | None = None) -> None:
        """A client that was asked to be on the safe side, and need not have been."""
        self._none(member, "not needed", cause, letter)

    def _none(self, member: Member, status: str, cause: str, letter: Letter | None) -> None:
        self.opened.skip(member.capability.client_id)
        note, copies = self._copies(letter)
        self._record(member, status, (cause, note), None, copies=copies)

    @staticmethod
    def _copies(letter: Letter | None) -> tuple[str, int]:
        """What there is to say of the copies, and how many went out."""
        return (letter.story, max(1, letter.sent)) if letter is not None else ("", 1)

    def _weight(self, overdue: Overdue) -> float:
        return self.late_weight ** (self.ledger.server_round - overdue.server_round)

    def _weighed(self, overdue: Overdue) -> str:
        weight = self._weight(overdue)
        return f"its examples count {weight:g} times" if weight < 1.0 else ""

    def _fold_in(
        self, member: Member, start: Start, result: TrainResult, overdue: Overdue | None
    ) -> None:
        client_id = member.capability.client_id
        if result.client_id != client_id:
            raise UpdateRefused(f"client {client_id}: replied as '{result.client_id}'.")
        if result.num_examples > member.capability.num_examples:
            raise UpdateRefused(
                f"client {client_id}: claims {result.num_examples} examples, it reported "
                f"{member.capability.num_examples} when it joined."
            )
        assert result.adapter is not None
        update = Update(
            client_id=client_id,
            adapter=result.adapter,
            num_examples=result.num_examples,
            rank_class=result.rank_class,
            base_round=result.base_round,
            digest=result.digest,
        )
        check_update(
            update, start.trained, digest=start.digest, max_norm=self.max_norm, local=start.local
        )
        if overdue is not None:
            self._check_plan(client_id, overdue)
            weight = self._weight(overdue)
            if weight == 0.0:
                raise UpdateRefused("dropped, as server.late-weight is 0")
            late = replace(update, rank_class=overdue.name, late=True, discount=weight)
            self.opened.add(late)
            self.late += 1
            return
        self.opened.add(update)
        self.counted += 1
        self._note_rank(member, start, update)

    def _check_plan(self, client_id: str, overdue: Overdue) -> None:
        """A method that has gone over to training something else cannot use what was trained."""
        late = overdue.start
        for start in self.sent.values():
            now = start.base_round > late.base_round
            if now and (start.trainable, start.local) != (late.trainable, late.local):
                raise UpdateRefused(
                    f"client {client_id}: trained {', '.join(late.trainable)} as round "
                    f"{overdue.server_round} asked; this round trains "
                    f"{', '.join(start.trainable)} in another way."
                )

    def _lower(self, member: Member, asked_rank: int) -> None:
        """Grant a rank that a client without memory asks for: a lower one, and at least 1."""
        if 1 <= asked_rank < member.rank_class.largest:
            client_id = member.capability.client_id
            self.lowered[client_id] = member.rank_class.lowered(asked_rank)

    def _note_rank(self, member: Member, start: Start, update: Update) -> None:
        sent = max(factors.rank for factors in start.trained.values())
        rank = max(factors.rank for factors in update.adapter.values())
        if start.local.prune_factor and rank < sent:
            self.lowered[update.client_id] = member.rank_class.lowered(rank)

    def _record(
        self,
        member: Member,
        status: str,
        told: tuple[str, str],
        result: TrainResult | None,
        *,
        bytes_up: int = 0,
        copies: int = 1,
    ) -> None:
        """``told`` is the cause and what is noted beside it, which observers are not told."""
        cause, _ = told
        self.ledger.record(
            member,
            bytes_down=copies * self.class_bytes[member.rank_class.name] if copies else 0,
            bytes_up=bytes_up,
            result=result,
            status=status,
            cause="; ".join(filter(None, told)),
        )
        self.tell(member.capability.client_id, "" if status == "not needed" else cause)
