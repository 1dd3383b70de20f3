"""Keep the roster: query nodes at the start, add new and returning ones between rounds.

A SuperNode with a registered key keeps its node id when it comes back; one without gets another,
and is recognised by its client's own id. A node that did not answer is asked again after 1, 2, 4
... rounds; one that answered and does not fit, once it has been away.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from flexlora.config.resolve import Config
from flexlora.lora.ranks import RankClass
from flexlora.server.members.bindings import Bindings
from flexlora.server.members.roster import Roster
from flexlora.server.members.selection import wait_for_nodes
from flexlora.server.settings import rank_policy_of
from flexlora.server.transport.backoff import backoff
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.exchange import ask, send
from flexlora.server.transport.flower_private import set_sender
from flexlora.server.transport.messages import decode_capability
from flexlora.server.transport.retry_queue import PendingMessage
from flexlora.wire.jobs import Capability

__all__ = ["Membership"]

LONGEST_WAIT_SECONDS = 30.0  # for the answer of a new node, before a round starts
MOST_ROUNDS = 64  # between two queries to a node that does not answer


class Membership:
    """The roster, queries to other nodes, and reports that are not in the roster yet.

    ``known`` are the rank classes of a resumed run, ``bindings`` say which node has which name.
    """

    def __init__(self, config: Config, known: Mapping[str, RankClass]) -> None:
        self.config, self.known = config, dict(known)
        self.bindings = Bindings.of_environment()
        self.roster = Roster()
        self._open: dict[int, PendingMessage] = {}
        self._queries: dict[int, tuple[int, int]] = {}  # node id: how many, the round of the last
        self._answered: set[int] = set()
        self._reports: dict[int, Capability] = {}

    def meet(self, grid: Grid, timeout: float) -> None:
        """Wait for nodes, query their capabilities, and assign every client its rank class.

        Raises:
            UserError: too few nodes in time, no client can train, or a damaged table of the fleet.
        """
        self.bindings.read()
        queries = [_query(node_id) for node_id in wait_for_nodes(grid, self.config)]
        reports = {
            pending.node_id: decode_capability(reply)
            if reply is not None
            else Capability.failed(f"node_{pending.node_id}", "no answer to the query")
            for pending, reply in ask(grid, queries, self.config, timeout)
        }
        self.bindings.read()
        policy = rank_policy_of(self.config)
        self.roster = Roster.meet(reports, policy, self.known, self.bindings)
        for node_id, report in reports.items():
            self._note(node_id, report, 0)

    def admit(self, grid: Grid, server_round: int, timeout: float) -> tuple[bool, dict[str, str]]:
        """Add nodes that came since: whether any client joined, and the causes of those left out.

        Nodes that are asked now get some time to answer. Those of a simulation are there from the
        start.
        """
        clock = clock_of(grid)
        if clock.simulated:
            return False, {}
        deadline = clock.now() + min(self.config.server.wait_seconds, timeout, LONGEST_WAIT_SECONDS)
        asked = self._poll(grid, server_round)
        while any(node_id in self._open for node_id in asked) and clock.now() < deadline:
            clock.wait(deadline)
            self._read(grid, server_round)
        before = dict(self.roster.left_out)
        joined = self._add_reports(grid)
        now = self.roster.left_out.items()
        return joined, {name: cause for name, cause in now if before.get(name) != cause}

    def find_node(
        self, grid: Grid, pending: PendingMessage, client_id: str, server_round: int
    ) -> int | None:
        """The node id under which a client is back whose node has gone, if it is."""
        self._poll(grid, server_round)
        self._add_reports(grid, members_only=True)
        node_id = self.roster.members[client_id].node_id
        moved = node_id != pending.node_id and node_id in set(grid.get_node_ids())
        return node_id if moved else None

    def _poll(self, grid: Grid, server_round: int) -> list[int]:
        """Query every unknown node that is connected and due, and read what has been answered."""
        connected = set(grid.get_node_ids())
        self._answered &= connected
        members = {member.node_id for member in self.roster.members.values()}
        unknown = sorted(connected - members - self._answered)
        due = [node_id for node_id in unknown if self._is_due(node_id, server_round)]
        queries = [_query(node_id) for node_id in due]
        send(grid, queries)
        for node_id, pending in zip(due, queries, strict=True):
            count, _ = self._queries.get(node_id, (0, 0))
            self._open[node_id], self._queries[node_id] = pending, (count + 1, server_round)
        self._read(grid, server_round)
        return due

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
                self._note(node_id, self._reports[node_id], server_round)

    def _note(self, node_id: int, report: Capability, server_round: int) -> None:
        """Record the answer of a node: an error reply of Flower has no version and is no answer."""
        if report.version:
            self._answered.add(node_id)
        else:
            count, _ = self._queries.get(node_id, (0, 0))
            self._queries[node_id] = max(1, count), server_round

    def _add_reports(self, grid: Grid, *, members_only: bool = False) -> bool:
        """Pass reports to the roster; True where a client joined.

        The report of a client whose former node is still connected waits until that node has gone.
        """
        self.bindings.read()
        connected, ready = set(grid.get_node_ids()), {}
        for node_id, report in list(self._reports.items()):
            client_id = report.client_id
            refused = self.bindings.refusal(node_id, client_id)
            holder = self.bindings.holder(client_id, node_id, connected)
            if node_id not in connected:
                del self._reports[node_id]
            elif holder is not None and not refused:
                self.roster.wait_for(client_id, node_id, holder)
            elif client_id in self.roster.members or not members_only:
                ready[node_id] = self._reports.pop(node_id)
        policy = rank_policy_of(self.config)
        return bool(self.roster.add(ready, policy, self.known, self.bindings))


def _query(node_id: int) -> PendingMessage:
    message = Message(RecordDict(), dst_node_id=node_id, message_type=MessageType.QUERY)
    return PendingMessage(message)
