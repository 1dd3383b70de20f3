"""Keep the roster: query nodes at the start, add new and returning ones between rounds.

A SuperNode with a registered key keeps its node id when it comes back; one without gets another,
and is recognised by its client's own id. A node that did not answer is asked again after 1, 2, 4
... rounds; one that answered and does not fit, once it has been away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from flexlora.config.resolve import Config
from flexlora.lora.ranks import RankClass
from flexlora.planning.base_modules import base_modules
from flexlora.server.members.bases import KnownBase
from flexlora.server.members.bindings import Bindings
from flexlora.server.members.roster import Roster
from flexlora.server.members.selection import wait_for_nodes
from flexlora.server.members.waiting import Say, WaitReport
from flexlora.server.settings import rank_policy_of
from flexlora.server.transport.backoff import backoff
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.exchange import ask, send
from flexlora.server.transport.flower_private import set_sender
from flexlora.server.transport.link import Unreachable, link_of
from flexlora.server.transport.messages import decode_capability
from flexlora.server.transport.pulling import pull
from flexlora.server.transport.retry_queue import PendingMessage
from flexlora.wire.jobs import Capability

__all__ = ["Membership"]

LONGEST_WAIT_SECONDS = 30.0  # for the answer of a new node, before a round starts
SILENT = "nodes that have not answered (does a ClientApp run there?)"
MOST_ROUNDS = 64  # between two queries to a node that does not answer


class Membership:
    """The roster, queries to other nodes, and reports that are not in the roster yet.

    ``known`` are the rank classes of a resumed run and ``shapes`` those of its modules;
    ``bindings`` say which node has which name; ``say`` is called with the
    names that are waited for.
    """

    def __init__(
        self,
        config: Config,
        known: Mapping[str, RankClass],
        shapes: Mapping[str, tuple[int, int]] | None = None,
        say: Say = lambda what, seconds: None,
    ) -> None:
        self.config, self.known, self.say = config, dict(known), say
        modules = base_modules(config.model.name, config.lora.target_modules)
        self.known_base = KnownBase(resumed=shapes, modules=modules)
        self.bindings = Bindings.of_environment()
        self.roster = Roster()
        self._open: dict[int, PendingMessage] = {}
        self._queries: dict[int, tuple[int, int]] = {}  # node id: how many, the round of the last
        self._answered: set[int] = set()
        self._reports: dict[int, Capability] = {}

    def meet(self, grid: Grid, timeout: float) -> None:
        """Wait for nodes, query their capabilities, and assign every client its rank class.

        A node that does not answer in ``server.wait-seconds`` is left out, and joins later if its
        answer comes.

        Raises:
            UserError: too few nodes in time, no client can train, or a damaged table of the fleet.
        """
        self.bindings.read()
        queries = [_query(node_id) for node_id in wait_for_nodes(grid, self.config, self.say)]
        clock = clock_of(grid)
        if not clock.simulated:
            timeout = min(timeout, max(self.config.server.wait_seconds, LONGEST_WAIT_SECONDS))
        waiting = WaitReport(self.say, clock, clock.now() + timeout)
        reports = {}

        def on_wait(silent: Iterable[PendingMessage]) -> None:
            waiting.report(SILENT, [self._named(pending.node_id) for pending in silent])

        for pending, reply in ask(grid, queries, self.config, timeout, on_wait):
            if reply is not None:
                reports[pending.node_id] = decode_capability(reply)
                continue
            cause = f"no answer to the query within {timeout:g} s"
            reports[pending.node_id] = Capability.failed(f"node_{pending.node_id}", cause)
            if pending.open:
                self._open[pending.node_id] = pending
        self.bindings.read()
        policy = rank_policy_of(self.config)
        self.roster = Roster.meet(reports, policy, self.known, self.bindings, self.known_base)
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
        waiting = WaitReport(self.say, clock, deadline)
        asked = self._poll(grid, server_round, deadline)
        while (open_ := [n for n in asked if n in self._open]) and clock.now() < deadline:
            waiting.report(SILENT, map(self._named, open_))
            clock.wait(deadline)
            self._read(grid, server_round)
        before = dict(self.roster.left_out)
        joined = self._add_reports(grid, deadline)
        now = self.roster.left_out.items()
        return joined, {name: cause for name, cause in now if before.get(name) != cause}

    def find_node(
        self, grid: Grid, pending: PendingMessage, client_id: str, server_round: int
    ) -> int | None:
        """The node id under which a client is back whose node has gone, if it is."""
        now = clock_of(grid).now()
        self._poll(grid, server_round, now)
        self._add_reports(grid, now, members_only=True)
        node_id = self.roster.members[client_id].node_id
        moved = node_id != pending.node_id and node_id in self._connected(grid, now)
        return node_id if moved else None

    @staticmethod
    def _connected(grid: Grid, deadline: float) -> set[int]:
        """The connected nodes; none where the SuperLink does not answer in time."""
        try:
            return link_of(grid).node_ids(deadline)
        except Unreachable:
            return set()

    def _poll(self, grid: Grid, server_round: int, deadline: float) -> list[int]:
        """Query every unknown node that is connected and due, and read what has been answered.

        Returns the nodes that are asked and have not left a query open.
        """
        connected = self._connected(grid, deadline)
        if not connected:
            return []
        self._answered &= connected
        members = {member.node_id for member in self.roster.members.values()}
        unknown = sorted(connected - members - self._answered)
        due = [node_id for node_id in unknown if self._is_due(node_id, server_round)]
        queries, silent = [_query(node_id) for node_id in due], set(self._open)
        send(grid, queries, deadline - clock_of(grid).now())
        for node_id, pending in zip(due, queries, strict=True):
            count, _ = self._queries.get(node_id, (0, 0))
            if node_id in self._open:
                pending.open += self._open[node_id].open
            self._open[node_id], self._queries[node_id] = pending, (count + 1, server_round)
        self._read(grid, server_round)
        return [node_id for node_id in due if node_id not in silent]

    def _named(self, node_id: int) -> str:
        """A node's id, and its name where the fleet's table has it."""
        name = self.bindings.name_of(node_id)
        return f"{node_id} ({name})" if name else str(node_id)

    def _is_due(self, node_id: int, server_round: int) -> bool:
        if node_id in self._reports:
            return False
        count, last = self._queries.get(node_id, (0, 0))
        return not count or server_round >= last + backoff(count, MOST_ROUNDS)

    def _read(self, grid: Grid, server_round: int) -> None:
        for node_id, pending in list(self._open.items()):
            if not pending.open:
                del self._open[node_id]
        waiting = [(pending, copy) for pending in self._open.values() for copy in pending.open]
        for pending, _, reply in pull(grid, waiting):
            if self._open.pop(pending.node_id, None) is not None:
                set_sender(reply, pending.node_id)
                self._reports[pending.node_id] = decode_capability(reply)
                self._note(pending.node_id, self._reports[pending.node_id], server_round)

    def _note(self, node_id: int, report: Capability, server_round: int) -> None:
        """Record the answer of a node: an error reply of Flower has no version and is no answer."""
        if report.version:
            self._answered.add(node_id)
        else:
            count, _ = self._queries.get(node_id, (0, 0))
            self._queries[node_id] = max(1, count), server_round

    def _add_reports(self, grid: Grid, deadline: float, *, members_only: bool = False) -> bool:
        """Pass reports to the roster; True where a client joined.

        The report of a client whose former node is still connected waits until that node has gone.
        """
        self.bindings.read()
        connected, ready = self._connected(grid, deadline), {}
        if not connected:
            return False
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
