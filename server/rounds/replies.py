"""Exchange the messages of one round of training; decode, validate and accumulate the replies.

A reply that comes after its round has closed still counts, within ``server.late-rounds`` rounds. A
residual form then subtracts the start that it was trained from, and its examples count
``server.late-weight`` times for every round that it is late.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message
from flwr.serverapp import Grid

from flexlora.aggregation.engine.norm_bound import norms_of
from flexlora.aggregation.engine.open_round import OpenRound, Settled
from flexlora.aggregation.engine.starts import Start
from flexlora.aggregation.engine.updates import Update, check_update
from flexlora.config.resolve import Config
from flexlora.errors import UpdateRefused
from flexlora.lora.ranks import RankClass
from flexlora.privacy.client_rounds import CLIENT_MODES
from flexlora.runs.outcomes import Outcome
from flexlora.seeds import derive_seed
from flexlora.server.members.membership import Membership
from flexlora.server.members.roster import Member
from flexlora.server.members.sampling import History
from flexlora.server.members.selection import Selected, too_few
from flexlora.server.observing.observer import Observer
from flexlora.server.rounds.client_rows import ClientRow
from flexlora.server.rounds.late_messages import LateMessage, LateMessages
from flexlora.server.rounds.round_metrics import RoundMetrics
from flexlora.server.rounds.round_plan import RoundPlan
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.exchange import exchange, retry_policy
from flexlora.server.transport.flower_private import LOST_CODES
from flexlora.server.transport.messages import content_bytes, decode_train_result
from flexlora.server.transport.retry_queue import PendingMessage
from flexlora.wire.jobs import TrainResult

__all__ = ["ReplyHandler"]

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Summed:
    """The row of an update that was added, and the class of a client that pruned its terms."""

    row: ClientRow
    late: bool
    lowered: RankClass | None


def _pruned_class(member: Member, start: Start, update: Update) -> RankClass | None:
    """The class at which a client stays that came back at a lower rank."""
    if update.late or not start.local.prune_factor:
        return None
    rank = max(factors.rank for factors in update.adapter.values())
    sent = max(factors.rank for factors in start.trained.values())
    return member.rank_class.lowered(rank) if rank < sent else None


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))


@dataclass(kw_only=True)
class ReplyHandler:
    """One open round of training: every reply is added to the method's sum or refused.

    Every client gets a row with its outcome and cause, which observers get too. ``sent`` holds the
    starts of this round and of the late messages by name. ``lowered`` collects the new rank class
    of clients that came back at a lower rank or ask for one.
    """

    plan: RoundPlan
    selected: Selected
    sent: Mapping[str, Start]
    opened: OpenRound
    late: LateMessages
    metrics: RoundMetrics
    membership: Membership
    history: History
    observer: Observer
    config: Config
    lowered: dict[str, RankClass] = field(default_factory=dict)
    counted: int = 0  # updates of this round in the sum
    counted_late: int = 0  # updates of earlier rounds in it
    _handled: set[PendingMessage] = field(default_factory=set)
    _summed: dict[str, _Summed] = field(default_factory=dict)  # by the update's key

    @property
    def enough(self) -> bool:
        """Whether the other replies are not needed."""
        return bool(self.plan.pending) and self.counted >= self.selected.needed

    def replies(self, grid: Grid, timeout: float) -> Iterator[Message]:
        """Send the messages, and yield replies until enough updates are in or the time is up.

        At the end clients without a reply get their rows, unanswered messages become late ones, and
        the history learns whose messages were lost, for back-off.
        """
        clock, needed, messages = clock_of(grid), self.selected.needed, self.plan.pending
        unanswered: list[PendingMessage] = []
        for pending, reply in exchange(
            grid,
            messages,
            timeout=timeout,
            policy=retry_policy(grid, self.config, timeout),
            late=self.late.pending,
            enough=lambda: self.enough,
            on_resent=self._on_resent,
            find_node=lambda p: self.membership.find_node(
                grid, p, messages[p], self.plan.server_round
            ),
            order=self._order(),
        ):
            if reply is not None:
                yield reply
            else:
                unanswered.append(pending)
        satisfied = self.enough
        for pending in unanswered:
            if satisfied:
                self._no_reply(pending, Outcome.NOT_NEEDED, f"{needed} updates came first")
            else:
                self._no_reply(pending, Outcome.SILENT, f"no reply within {timeout:g} s")
        self.late.close_round(self.plan, clock, () if satisfied else None)
        for pending, client_id in messages.items():
            pending.drop_content()
            if pending.answered and not clock.simulated:
                self.history.hear(client_id)
            elif not clock.simulated and (pending.error is not None or not satisfied):
                self.history.lose(client_id, self.plan.server_round)

    def _on_resent(self, pending: PendingMessage, loss: str) -> None:
        self.metrics.resent += 1
        self.observer.resent(self.plan.pending[pending], pending.sent, loss)

    def _order(self) -> dict[PendingMessage, int]:
        """Which replies are read first: drawn, where more clients are asked than needed."""
        if self.selected.needed >= len(self.plan.pending):
            return {}
        purpose = (self.config.seed, "arrival", self.plan.server_round)
        return {p: derive_seed(*purpose, client_id) for p, client_id in self.plan.pending.items()}

    def handle(self, reply: Message) -> None:
        """Handle one reply: to a message of this round, to a late one, or to neither."""
        message_id = reply.metadata.reply_to_message_id
        pending = next((p for p in self.plan.pending if p.has_sent(message_id)), None)
        late = self.late.pop(message_id) if pending is None else None
        if late is not None:
            self._record_late(self._add(late.client_id, late.start_name, reply, late), late)
            if not reply.has_error():
                self.history.hear(late.client_id)
        elif pending is not None and pending not in self._handled:
            self._handled.add(pending)
            client_id = self.plan.pending[pending]
            row = self._add(client_id, self.plan.asked[client_id], reply)
            if row.outcome is not Outcome.OK:
                self.opened.skip(client_id)
            self._record(row, pending)
        else:
            what = "a second reply" if pending else "a reply to nothing that was sent"
            sender = f"node {reply.metadata.src_node_id}"
            sender = self.plan.pending[pending] if pending else sender
            LOG.warning("%s: %s in round %d, dropped", sender, what, self.plan.server_round)

    def settle(self) -> Settled:
        """Apply the bounds that needed all updates, once no reply can come any more.

        Observers hear only now of the updates that had to wait for that.
        """
        waited = not self.opened.decides
        settled = self.opened.settle()
        for key, summed in self._summed.items():
            row = summed.row
            if key in settled.refused:
                cause = f"client {row.client_id}: {settled.refused[key]}"
                row.outcome, row.cause = Outcome.REFUSED, _joined(row.cause, cause)
                self.counted -= not summed.late
                self.counted_late -= summed.late
            elif summed.lowered is not None:
                self.lowered[row.client_id] = summed.lowered
            if key in settled.shares:
                share = settled.shares[key]
                row.discount *= share
                note = f"it counts {share:.3g} times, the largest share of a round's weight"
                row.note = _joined(row.note, note)
            if key in settled.weights:
                row.discount = settled.weights[key]
                row.note = _joined(row.note, self._verdict(row.discount))
            if waited:
                self.observer.replied(row.client_id, row.outcome, row.cause, row.late)
        return settled

    def _verdict(self, weight: float) -> str:
        """What the robust rule made of an update; 1 is its weight in the plain mean."""
        rule = self.config.robust.rule
        return f"{rule} left it out" if weight == 0.0 else f"{rule}: it counts {weight:.3g} times"

    def skipped(self, quorum: int) -> str:
        """Why the round changes nothing: fewer clients or updates than needed; else empty."""
        counted, least = self.counted + self.counted_late, self.opened.least_updates
        if counted < least and not self.selected.skipped:
            return (
                f"skipped: {counted} updates came, robust.rule={self.config.robust.rule} needs "
                f"{least} against the assumed share of hostile clients; the round changes nothing"
            )
        cause = too_few(counted, quorum, "updates came") if counted < quorum else ""
        return self.selected.skipped or cause

    def _record_late(self, row: ClientRow, late: LateMessage) -> None:
        """The joules of a late row were counted in the round that sent the message."""
        prefix = f"late: trained from round {late.start.base_round}"
        row.late, row.cause = True, _joined(prefix, row.cause)
        weight = self._weight(late)
        if row.outcome is Outcome.OK and weight < 1.0:
            row.discount, row.note = weight, f"it counts {weight:g} times"
        if late.spent is not None:
            row.simulated_seconds = late.spent.seconds
        self._record(row)

    def _no_reply(self, pending: PendingMessage, outcome: Outcome, cause: str) -> None:
        """A client that sent nothing: it was silent, or is not needed."""
        client_id = self.plan.pending[pending]
        self.opened.skip(client_id)
        member = self._member(client_id)
        self._record(ClientRow.of(member, self.plan.server_round, outcome, cause), pending)

    def _member(self, client_id: str) -> Member:
        return self.membership.roster.members[client_id]

    def _record(self, row: ClientRow, pending: PendingMessage | None = None) -> None:
        if pending is not None:
            disputed = self.membership.roster.disputed.pop(row.client_id, "")
            row.note = "; ".join(filter(None, (pending.note, disputed)))
            row.bytes_down = max(1, pending.sent) * self.plan.class_bytes[row.rank_class]
        self.metrics.rows.append(row)
        if self.opened.decides or row.outcome is not Outcome.OK:
            self.observer.replied(row.client_id, row.outcome, row.cause, row.late)

    def _add(
        self, client_id: str, start_name: str, reply: Message, late: LateMessage | None = None
    ) -> ClientRow:
        """Decode a reply, check it and add its update to the sum; returns the client's row."""
        member = self._member(client_id)
        row = ClientRow.of(member, self.plan.server_round, Outcome.FAILED, "")
        start = self.sent[start_name].for_client(client_id)
        try:
            result = decode_train_result(reply, start)
        except UpdateRefused as error:
            lost = reply.has_error() and reply.error.code in LOST_CODES
            row.outcome, row.cause = Outcome.LOST if lost else Outcome.FAILED, str(error)
            return row
        row.add_result(result)
        row.bytes_up = content_bytes(reply.content)
        if result.adapter is None or result.cause:
            row.outcome = Outcome.OUT_OF_MEMORY if result.out_of_memory else Outcome.FAILED
            row.cause = result.cause or "the reply holds no factors"
            if 1 <= result.asked_rank < member.rank_class.largest:
                self.lowered[client_id] = member.rank_class.lowered(result.asked_rank)
            return row
        try:
            update = self._validated(member, start, result)
            update = update if late is None else self._discounted(update, late)
            self.opened.add(update)
        except UpdateRefused as error:
            row.outcome, row.cause = Outcome.REFUSED, str(error)
            return row
        row.outcome, row.cause = Outcome.OK, result.note
        lowered = _pruned_class(member, start, update)
        self._summed[update.key] = _Summed(row=row, late=update.late, lowered=lowered)
        self.counted += not update.late
        self.counted_late += update.late
        return row

    def _validated(self, member: Member, start: Start, result: TrainResult) -> Update:
        """The update of a result that is this client's and fits what it was sent.

        Raises:
            UpdateRefused: it does not; the sum is as before.
        """
        client_id = member.capability.client_id
        if result.client_id != client_id:
            raise UpdateRefused(f"client {client_id}: replied as '{result.client_id}'.")
        if result.num_examples > member.capability.num_examples:
            raise UpdateRefused(
                f"client {client_id}: claims {result.num_examples} examples, it reported "
                f"{member.capability.num_examples} when it joined."
            )
        if result.withheld and self.config.privacy.mode not in CLIENT_MODES:
            raise UpdateRefused(
                f"client {client_id}: withholds its losses, which clients do under privacy.mode="
                f"{' or '.join(CLIENT_MODES)} only."
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
        check_update(update, start.trained, digest=start.digest, local=start.local)
        named, sent = (
            (result.rank_class, result.base_round),
            (start.rank_class.name, start.base_round),
        )
        if named != sent:
            raise UpdateRefused(
                f"client {client_id}: trained '{named[0]}' of round {named[1]} by its word, it was "
                f"sent '{sent[0]}' of round {sent[1]}."
            )
        return replace(update, norms=norms_of(update.adapter, start.trained))

    def _discounted(self, update: Update, late: LateMessage) -> Update:
        """The update of an earlier round, which counts less.

        Raises:
            UpdateRefused: this round trains something else, or late updates have no weight.
        """
        self._check_same_kind(late)
        weight = self._weight(late)
        if weight == 0.0:
            raise UpdateRefused("dropped, as server.late-weight is 0")
        return replace(update, rank_class=late.start_name, late=True, discount=weight)

    def _weight(self, late: LateMessage) -> float:
        return self.config.server.late_weight ** (self.plan.server_round - late.server_round)

    def _check_same_kind(self, late: LateMessage) -> None:
        """Refuse a late update where the method trains other factors by now."""
        old = late.start
        for start in self.sent.values():
            newer = start.base_round > old.base_round
            if newer and (start.trainable, start.local) != (old.trainable, old.local):
                raise UpdateRefused(
                    f"client {late.client_id}: trained {', '.join(old.trainable)} as round "
                    f"{late.server_round} asked; this round trains "
                    f"{', '.join(start.trainable)} in another way."
                )
