"""One round of training whose updates are summed without the server seeing any of them.

    keys, shares     two queries to every sampled client (``secure_sum.py``)
    train            its message with the others' shares; the reply is added as it comes
    unmask           one query to every client whose update came; then the sum is decoded

The steps of the strategy are those of plain rounds: ``replies`` runs all four exchanges, ``settle``
hands the sum to the method. Rows have no loss and no norm of single clients; their means are in
``metrics.jsonl``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from flexlora.aggregation.engine.open_round import Settled
from flexlora.config.resolve import Config
from flexlora.errors import UpdateRefused
from flexlora.runs.outcomes import Outcome
from flexlora.seeds import derive_seed
from flexlora.server.rounds.client_rows import ClientRow
from flexlora.server.rounds.late_messages import LateMessage
from flexlora.server.rounds.replies import ReplyHandler
from flexlora.server.rounds.secure_cohorts import has_small_band
from flexlora.server.rounds.secure_secrets import SumFailed
from flexlora.server.rounds.secure_sum import SecureSum, Terms, band_note
from flexlora.server.transport.exchange import exchange, retry_policy
from flexlora.server.transport.flower_private import LOST_CODES
from flexlora.server.transport.messages import content_bytes
from flexlora.server.transport.retry_queue import REPORT_BYTES, PendingMessage
from flexlora.server.transport.secure_messages import (
    decode_masked,
    decode_phase,
    phase_content,
    secure_bytes,
    with_request,
)
from flexlora.wire.jobs import TrainResult
from flexlora.wire.secure_messages import SECURE, KeysReply, MaskedNote, SharesReply, UnmaskReply

__all__ = ["SecureReplies", "handler_for"]

LOG = logging.getLogger(__name__)
Requests = Mapping[int, Any]  # by place
NO_HOLDERS = Outcome.FAILED, "too few of the clients that hold its shares are left"


@dataclass(kw_only=True)
class SecureReplies(ReplyHandler):
    """A round whose updates come masked. ``places`` are the sampled clients in a fixed order."""

    places: dict[int, str] = field(default_factory=dict)
    _sum: SecureSum | None = None
    _job: ConfigRecord = field(default_factory=ConfigRecord)  # of the train messages
    _failed: str = ""  # why the sum cannot be had
    _rows: dict[str, ClientRow] = field(default_factory=dict)
    _missing: dict[str, tuple[Outcome, str]] = field(default_factory=dict)
    _up: dict[str, int] = field(default_factory=dict)  # bytes of the small phases by client
    _down: dict[str, int] = field(default_factory=dict)

    @property
    def sum(self) -> SecureSum:
        assert self._sum is not None
        return self._sum

    def replies(self, grid: Grid, timeout: float) -> Iterator[Message]:
        """All four exchanges; yields the replies to train messages as in a plain round."""
        if not self.plan.pending:
            return
        try:
            self._open()
            masks = self._before_training(grid, timeout)
        except SumFailed as error:
            self._fail(str(error))
            for pending in list(self.plan.pending):
                self._no_reply(pending, Outcome.NOT_NEEDED, "the round has no sum")
            return
        self._send_with(masks)
        yield from super().replies(grid, timeout)
        try:
            requests = self.sum.unmask_requests()
            self._phase(grid, requests, UnmaskReply, self.sum.add_unmask, timeout)
        except SumFailed as error:
            self._fail(str(error))

    def _open(self) -> None:
        """The sum of the sampled clients, and its public values."""
        config, names = self.config, sorted(self.plan.asked)
        message = next(iter(self.plan.pending)).message
        assert message is not None
        self._job = message.content.config_records["job"]
        self.places = dict(enumerate(names, start=1))
        members = {place: self._member(name) for place, name in self.places.items()}
        private, roster = self.opened.private, self.membership.roster
        most = max(m.capability.num_examples for m in members.values())
        try:
            self._sum = SecureSum(
                Terms(
                    server_round=self.plan.server_round,
                    seed=derive_seed(config.seed, SECURE, self.plan.server_round),
                    clip=config.privacy.clip if private is None else private.clip,
                    largest=most if config.privacy.by_examples else 1,
                    min_group=config.privacy.min_group,
                    pooled=private is not None and has_small_band(roster, config),
                ),
                {place: member.rank_class for place, member in members.items()},
                roster.shapes,
                None if private is None else roster.rank_classes,
            )
        except ValueError as error:
            raise SumFailed(str(error)) from None

    def _before_training(self, grid: Grid, timeout: float) -> Requests:
        secure = self.sum
        self._phase(grid, secure.keys_requests(), KeysReply, secure.add_keys, timeout)
        self._drop_without(secure.keyed)
        self._phase(grid, secure.shares_requests(), SharesReply, secure.add_shares, timeout)
        masks = secure.mask_requests()
        self._drop_without(secure.asked)
        return masks

    def _phase(
        self,
        grid: Grid,
        requests: Requests,
        kind: type,
        add: Callable[[int, Any], None],
        timeout: float,
    ) -> None:
        """Send every client its query and add the replies; a client that fails has its row."""
        pending = {self._query(place, request): place for place, request in requests.items()}
        seconds = min(timeout, self.config.server.wait_seconds or timeout)
        server_round = self.plan.server_round
        for message, reply in exchange(
            grid,
            pending,
            timeout=seconds,
            policy=retry_policy(grid, self.config, seconds),
            on_resent=lambda p, loss: self.observer.resent(self.places[pending[p]], p.sent, loss),
            find_node=lambda p: self.membership.find_node(
                grid, p, self.places[pending[p]], server_round
            ),
        ):
            place, name = pending[message], self.places[pending[message]]
            if reply is None:
                self._missing[name] = Outcome.SILENT, f"no reply within {seconds:g} s"
                continue
            try:
                add(place, decode_phase(reply, kind))
                self._up[name] = self._up.get(name, 0) + secure_bytes(reply.content)
            except UpdateRefused as error:
                lost = reply.has_error() and reply.error.code in LOST_CODES
                self._missing[name] = Outcome.LOST if lost else Outcome.FAILED, str(error)

    def _query(self, place: int, request: object) -> PendingMessage:
        client_id = self.places[place]
        content = phase_content(request, self._job)
        self._down[client_id] = self._down.get(client_id, 0) + secure_bytes(content)
        message = Message(
            content,
            dst_node_id=self._member(client_id).node_id,
            message_type=MessageType.QUERY,
            group_id=str(self.plan.server_round),
        )
        return PendingMessage(message)

    def _drop_without(self, places: Sequence[int]) -> None:
        """Send no train message to the others, which have their rows now."""
        staying, left = {self.places[place] for place in places}, {}
        for pending, client_id in self.plan.pending.items():
            if client_id in staying:
                left[pending] = client_id
                continue
            outcome, cause = self._missing.get(client_id, NO_HOLDERS)
            self._no_reply(pending, outcome, cause)
            if self.metrics.measured and outcome in (Outcome.LOST, Outcome.SILENT):
                self.history.lose(client_id, self.plan.server_round)
        self.plan = replace(self.plan, pending=left)

    def _send_with(self, masks: Requests) -> None:
        """The train messages, each with its client's part of the sum."""
        places, made = {name: place for place, name in self.places.items()}, {}
        for pending, client_id in self.plan.pending.items():
            old, place = pending.message, places[client_id]
            assert old is not None
            content = with_request(old.content, masks[place])
            self._down[client_id] += secure_bytes(content)
            message = Message(
                content,
                dst_node_id=pending.node_id,
                message_type=MessageType.TRAIN,
                group_id=pending.metadata.group_id,
            )
            most_bytes = self.sum.most_bytes(place) + REPORT_BYTES
            made[PendingMessage(message, most_bytes)] = client_id
        self.plan = replace(self.plan, pending=made)

    def _add(
        self, client_id: str, start_name: str, reply: Message, late: LateMessage | None = None
    ) -> ClientRow:
        """Add one client's masked numbers to the sum; returns its row."""
        member = self._member(client_id)
        row = ClientRow.of(member, self.plan.server_round, Outcome.FAILED, "")
        self._rows[client_id] = row
        try:
            result, note, data = decode_masked(reply)
        except UpdateRefused as error:
            lost = reply.has_error() and reply.error.code in LOST_CODES
            row.outcome, row.cause = Outcome.LOST if lost else Outcome.FAILED, str(error)
            return row
        row.seconds, row.base_round = result.train_seconds, result.base_round
        row.bytes_up = content_bytes(reply.content) + secure_bytes(reply.content)
        if note is None:
            return self._failed_row(row, member, result)
        try:
            self._check(client_id, start_name, result, note)
            place = next(p for p, name in self.places.items() if name == client_id)
            self.sum.add_masked(place, data)
        except UpdateRefused as error:
            row.outcome, row.cause = Outcome.REFUSED, f"client {client_id}: {error}"
            return row
        row.outcome, row.cause = Outcome.OK, result.note
        self.counted += 1
        return row

    def _check(
        self, client_id: str, start_name: str, result: TrainResult, note: MaskedNote
    ) -> None:
        """Refuse the reply of another client, round or start.

        Raises:
            UpdateRefused: it is.
        """
        start = self.sent[start_name]
        given = (result.client_id, result.rank_class, result.base_round, result.digest)
        wanted = (client_id, start.rank_class.name, start.base_round, start.digest)
        self.sum.check_session(note)
        if given != wanted:
            raise UpdateRefused(
                f"the update is of client '{given[0]}', class '{given[1]}', round {given[2]} and "
                f"start {given[3][:12]}, expected '{wanted[0]}', '{wanted[1]}', {wanted[2]} and "
                f"{wanted[3][:12]}."
            )

    # --- the end of the round ------------------------------------------------------------------

    def settle(self) -> Settled:
        """Decode the sum, for the method to close the round with; or note why there is none."""
        settled = super().settle()
        if self._sum is None or self._failed:
            return settled
        try:
            opened = self.sum.opened()
        except SumFailed as error:
            self._fail(str(error))
            return settled
        statistics = opened.statistics
        weight = statistics.examples
        count = len(self.sum.alive)
        unclipped = count - statistics.clipped
        self.opened.add_linear(opened.matrices, weight, statistics.energy, count, unclipped)
        self.metrics.summed = {
            "train_loss": statistics.loss / weight,
            "clipped_share": statistics.clipped / count,
            "summed_clients": count,
        }
        notes = [
            band_note(self.sum.bands[band], count, self.config.privacy.min_group)
            for band, count in sorted(self.sum.left_out.items())
        ]
        if notes:
            self.metrics.summed["left_out"] = "; ".join(notes)
        self._finish_rows()
        return settled

    def skipped(self, quorum: int) -> str:
        return self._failed or super().skipped(quorum)

    def _fail(self, cause: str) -> None:
        self._failed = f"the secure sum failed: {cause}"

    def _finish_rows(self) -> None:
        """The bytes of the small phases, and shares that were wrong."""
        for client_id, row in self._rows.items():
            row.bytes_up = (row.bytes_up or 0) + self._up.get(client_id, 0)
            row.bytes_down = (row.bytes_down or 0) + self._down.get(client_id, 0)
        for place, count in self.sum.wrong.items():
            row = self._rows[self.places[place]]
            row.note = "; ".join(filter(None, (row.note, f"{count} shares of others are wrong")))


def handler_for(config: Config) -> type[ReplyHandler]:
    """The kind of round that the configuration asks for."""
    return SecureReplies if config.privacy.secure else ReplyHandler
