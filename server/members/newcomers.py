"""Query nodes that the roster does not know, between two rounds.

A SuperNode with a registered key keeps its node id when it comes back; one without gets another,
and is recognised by its client's own id. A node that did not answer is asked again after 1, 2, 4
... rounds; one that answered and does not fit, once it has been away.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from flexlora.server.members.roster import Roster
from flexlora.server.transport.backoff import backoff
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.exchange import send
from flexlora.server.transport.flower_private import set_sender
from flexlora.server.transport.messages import decode_capability
from flexlora.server.transport.retry_queue import PendingMessage
from flexlora.wire.jobs import Capability

__all__ = ["Newcomers", "query"]

LONGEST_WAIT_SECONDS = 30.0  # for the answer of a new node, before a round starts
MOST_ROUNDS = 64  # between two queries to a node that does not answer


def query(node_id: int) -> PendingMessage:
    """The message that asks a node for its capability."""
    return PendingMessage(
        Message(RecordDict(), dst_node_id=node_id, message_type=MessageType.QUERY)
    )


class Newcomers:
    """Queries to nodes, and the reports that are not in the roster yet."""

    def __init__(self) -> None:
        self._open: dict[int, PendingMessage] = {}
        self._queries: dict[int, tuple[int, int]] = {}  # node id: how many, the round of the last
        self._answered: set[int] = set()
        self._reports: dict[int, Capability] = {}

    def add_reports(self, reports: Mapping[int, Capability], server_round: int = 0) -> None:
        """Note which nodes answered for themselves: an error of Flower's names no version."""
        for node_id, report in reports.items():
            if report.version:
                self._answered.add(node_id)
            else:
                count, _ = self._queries.get(node_id, (0, 0))
                self._queries[node_id] = max(1, count), server_round

    def poll(self, grid: Grid, roster: Roster, server_round: int) -> list[int]:
        """Query every unknown node that is connected and due, and read what has been answered."""
        connected = set(grid.get_node_ids())
        self._answered &= connected
        members = {member.node_id for member in roster.members.values()}
        unknown = sorted(connected - members - self._answered)
        queries = [query(node_id) for node_id in unknown if self._is_due(node_id, server_round)]
        send(grid, queries)
        for pending in queries:
            count, _ = self._queries.get(pending.node_id, (0, 0))
            self._open[pending.node_id] = pending
            self._queries[pending.node_id] = count + 1, server_round
        self._read(grid, server_round)
        return [pending.node_id for pending in queries]

    def _is_due(self, node_id: int, server_round: int) -> bool:
        if node_id in self._reports or node_id in self._open:
            return False
        count, last = self._queries.get(node_id, (0, 0))
        return not count or server_round >= last + backoff(count, MOST_ROUNDS)

    def _read(self, grid: Grid, server_round: int) -> None:
        for node_id, pending in list(self._open.items()):
            replies = list(grid.pull_messages(pending.open))[:1] if pending.open else []
            if replies or not pending.open:
                del self._open[node_id]
            for reply in replies:
                set_sender(reply, node_id)
                self._reports[node_id] = decode_capability(reply)
                self.add_reports({node_id: self._reports[node_id]}, server_round)

    def wait(self, grid: Grid, roster: Roster, server_round: int, seconds: float) -> None:
        """``poll``, and give the nodes that were asked now some time to answer."""
        clock = clock_of(grid)
        deadline = clock.now() + min(seconds, LONGEST_WAIT_SECONDS)
        asked = self.poll(grid, roster, server_round)
        while any(node_id in self._open for node_id in asked) and clock.now() < deadline:
            clock.wait(deadline)
            self._read(grid, server_round)

    def take(
        self, grid: Grid, roster: Roster, *, members_only: bool = False
    ) -> dict[int, Capability]:
        """Remove and return the reports that can enter the roster now.

        The report of a client whose former node is still connected waits until that node has gone.
        """
        connected = set(grid.get_node_ids())
        taken = {}
        for node_id, report in list(self._reports.items()):
            member = roster.members.get(report.client_id)
            elsewhere = member is not None and member.node_id in connected - {node_id}
            if node_id not in connected:
                del self._reports[node_id]
            elif not elsewhere and (member is not None or not members_only):
                taken[node_id] = self._reports.pop(node_id)
        return taken
