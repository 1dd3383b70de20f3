"""What a round takes in: each reply decoded, checked against what its client was sent, folded in.

A reply that comes after its round has closed still counts, a round or so later: it names the start
that it was trained from, and that start, not this round's, is what a residual form subtracts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from flexlora.server.ledger import RoundLedger
from flexlora.server.messages import content_bytes, decode_train
from flexlora.server.roster import Member
from flwr.app import Message

from flexlora.aggregation.base import Round, Start, Update, check_update
from flexlora.errors import UpdateRefused
from flexlora.jobs import TrainResult
from flexlora.ranks import RankClass

__all__ = ["Intake", "Overdue", "OverdueBook"]


@dataclass(frozen=True, kw_only=True)
class Overdue:
    """A message that was not answered in its round, and what was in it."""

    node_id: int
    server_round: int
    start: Start

    @property
    def name(self) -> str:
        """The start's name among those of a later round."""
        return f"{self.start.rank_class.name}@{self.server_round}"


class OverdueBook:
    """Messages of earlier rounds that may still be answered, by message id."""

    def __init__(self, late_rounds: int) -> None:
        self.late_rounds = late_rounds
        self._open: dict[str, Overdue] = {}

    def __contains__(self, message_id: object) -> bool:
        return message_id in self._open

    @property
    def nodes(self) -> dict[str, int]:
        return {message_id: late.node_id for message_id, late in self._open.items()}

    @property
    def starts(self) -> dict[str, Start]:
        return {late.name: late.start for late in self._open.values()}

    def take(self, message_id: str) -> Overdue | None:
        return self._open.pop(message_id, None)

    def keep(self, more: Mapping[str, Overdue], server_round: int) -> None:
        """After ``server_round``: take in ``more``, forget what is too old for the next round."""
        oldest = server_round + 1 - self.late_rounds
        self._open = {k: v for k, v in {**self._open, **more}.items() if v.server_round >= oldest}


@dataclass(kw_only=True)
class Intake:
    """One open round and its rows; ``tell`` is called with each client and its cause, if any.

    ``lowered`` collects the clients that came back at a lower rank than they were sent.
    """

    opened: Round
    sent: Mapping[str, Start]
    class_bytes: Mapping[str, int]
    ledger: RoundLedger
    max_norm: float
    tell: Callable[[str, str], None]
    lowered: dict[str, RankClass] = field(default_factory=dict)
    counted: int = 0  # updates of this round in the sum
    late: int = 0  # updates of earlier rounds in it

    def take(self, member: Member, reply: Message, overdue: Overdue | None = None) -> None:
        """Fold in one reply; the row of ``clients.csv`` says what became of it."""
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
        self._record(member, status, cause, result, bytes_up=bytes_up, late=overdue is not None)

    def missing(self, member: Member, cause: str) -> None:
        """A client that sent nothing at all."""
        self.opened.skip(member.capability.client_id)
        self._record(member, "failed", cause, None)

    def unneeded(self, member: Member, cause: str) -> None:
        """A client that was asked to be on the safe side, and need not have been."""
        self.opened.skip(member.capability.client_id)
        self._record(member, "not needed", cause, None)

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
            self.opened.add(replace(update, rank_class=overdue.name, late=True))
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
        cause: str,
        result: TrainResult | None,
        *,
        bytes_up: int = 0,
        late: bool = False,
    ) -> None:
        self.ledger.record(
            member,
            bytes_down=0 if late else self.class_bytes[member.rank_class.name],
            bytes_up=bytes_up,
            result=result,
            status=status,
            cause=cause,
        )
        self.tell(member.capability.client_id, "" if status == "not needed" else cause)
