"""Who belongs to a run: those who were there when it began, those who come later or come back."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.serverapp import Grid

from flexlora.config.resolve import Config
from flexlora.lora.ranks import RankClass
from flexlora.server.members.newcomers import Newcomers, query
from flexlora.server.members.roster import Roster
from flexlora.server.members.selection import wait_for_nodes
from flexlora.server.settings import rank_policy_of
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.exchange import ask
from flexlora.server.transport.messages import decode_capability
from flexlora.server.transport.resending import Letter
from flexlora.wire.jobs import Capability

__all__ = ["Membership"]


class Membership:
    """The roster, and how it grows; ``known`` are the rank classes of a resumed run."""

    def __init__(self, config: Config, known: Mapping[str, RankClass]) -> None:
        self.config, self.known = config, dict(known)
        self.roster = Roster()
        self._newcomers = Newcomers()

    def meet(self, grid: Grid, timeout: float) -> None:
        """Wait for nodes, ask what each can train, and give every client its rank class.

        Raises:
            UserError: too few nodes in time, or nobody can train.
        """
        letters = [query(node_id) for node_id in wait_for_nodes(grid, self.config)]
        reports = {
            letter.node_id: decode_capability(reply)
            if reply is not None
            else Capability.failed(f"node_{letter.node_id}", "no answer to the query")
            for letter, reply in ask(grid, letters, self.config, timeout)
        }
        self.roster = Roster.meet(reports, rank_policy_of(self.config), self.known)
        self._newcomers.met(reports)

    def welcome(self, grid: Grid, server_round: int, timeout: float) -> tuple[bool, dict[str, str]]:
        """Take in who has come since: whether somebody has, and who had to be left out now.

        The nodes of a simulation are all there at once.
        """
        if clock_of(grid).simulated:
            return False, {}
        seconds = min(self.config.server.wait_seconds, timeout)
        self._newcomers.wait(grid, self.roster, server_round, seconds)
        before = dict(self.roster.left_out)
        joined = self._take_in(self._newcomers.take(grid, self.roster))
        now = self.roster.left_out.items()
        return joined, {name: cause for name, cause in now if before.get(name) != cause}

    def forward(self, grid: Grid, letter: Letter, client_id: str, server_round: int) -> int | None:
        """Where a client is whose node has gone, if it is back under another id."""
        self._newcomers.look(grid, self.roster, server_round)
        self._take_in(self._newcomers.take(grid, self.roster, back=True))
        node_id = self.roster.members[client_id].node_id
        moved = node_id != letter.node_id and node_id in set(grid.get_node_ids())
        return node_id if moved else None

    def _take_in(self, reports: Mapping[int, Capability]) -> bool:
        return bool(self.roster.take_in(reports, rank_policy_of(self.config), self.known))
