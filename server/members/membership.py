"""Keep the roster: meet nodes at the start, add new and returning ones between rounds."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.serverapp import Grid

from flexlora.lora.ranks import RankClass
from flexlora.server.members.newcomers import Newcomers, query
from flexlora.server.members.roster import Roster
from flexlora.server.members.selection import wait_for_nodes
from flexlora.server.settings import ServerSettings
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.exchange import ask
from flexlora.server.transport.messages import decode_capability
from flexlora.server.transport.retry_queue import PendingMessage
from flexlora.wire.jobs import Capability

__all__ = ["Membership"]


class Membership:
    """The roster and its changes; ``known`` are the rank classes of a resumed run."""

    def __init__(self, settings: ServerSettings, known: Mapping[str, RankClass]) -> None:
        self.settings, self.known = settings, dict(known)
        self.roster = Roster()
        self._newcomers = Newcomers()

    def meet(self, grid: Grid, timeout: float) -> None:
        """Wait for nodes, query their capabilities, and assign every client its rank class.

        Raises:
            UserError: too few nodes in time, or no client can train.
        """
        queries = [query(node_id) for node_id in wait_for_nodes(grid, self.settings)]
        reports = {
            pending.node_id: decode_capability(reply)
            if reply is not None
            else Capability.failed(f"node_{pending.node_id}", "no answer to the query")
            for pending, reply in ask(grid, queries, self.settings, timeout)
        }
        self.roster = Roster.meet(reports, self.settings.rank_policy, self.known)
        self._newcomers.add_reports(reports)

    def admit(self, grid: Grid, server_round: int, timeout: float) -> tuple[bool, dict[str, str]]:
        """Add nodes that came since: whether any client joined, and the causes of those left out.

        The nodes of a simulation are all there at the start.
        """
        if clock_of(grid).simulated:
            return False, {}
        seconds = min(self.settings.wait_seconds, timeout)
        self._newcomers.wait(grid, self.roster, server_round, seconds)
        before = dict(self.roster.left_out)
        joined = self._add(self._newcomers.take(grid, self.roster))
        now = self.roster.left_out.items()
        return joined, {name: cause for name, cause in now if before.get(name) != cause}

    def find_node(
        self, grid: Grid, pending: PendingMessage, client_id: str, server_round: int
    ) -> int | None:
        """The node id under which a client is back whose node has gone, if it is."""
        self._newcomers.poll(grid, self.roster, server_round)
        self._add(self._newcomers.take(grid, self.roster, members_only=True))
        node_id = self.roster.members[client_id].node_id
        moved = node_id != pending.node_id and node_id in set(grid.get_node_ids())
        return node_id if moved else None

    def _add(self, reports: Mapping[int, Capability]) -> bool:
        return bool(self.roster.add(reports, self.settings.rank_policy, self.known))
