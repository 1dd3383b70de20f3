"""Whom a round asks: waits until a quorum can be reached, samples, and asks some more than needed.

The time that is waited is the grid's own (``clocks.py``), so that a simulated night passes as a
real one would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.server.members.backoff import awake
from flexlora.server.members.roster import Roster
from flexlora.server.members.sampling import History, Reachable, choose
from flexlora.server.transport.clocks import clock_of

__all__ = ["Selected", "Selector", "too_few", "wait_for_nodes"]


@dataclass(frozen=True, kw_only=True)
class Selected:
    """Who is asked, how many updates are enough, who sits out, or why nobody is asked."""

    client_ids: tuple[str, ...] = ()
    needed: int = 0
    cause: str = ""
    resting: Mapping[str, str] = field(default_factory=dict)


class Selector:
    """``sampling.policy``, ``server.over-selection`` and ``server.quorum`` at work."""

    def __init__(self, config: Config, history: History | None = None) -> None:
        self.config, self.history = config, history or History()

    def select(self, grid: Grid, roster: Roster, server_round: int) -> Selected:
        """The clients of one round; nobody where fewer than the quorum can be reached in time."""
        config = self.config
        count = max(
            config.min_train_clients,
            config.server.quorum,
            round(config.fraction_train * len(roster.members)),
        )
        reachable = self._wait(grid, roster)
        self.history.see([client.client_id for client in reachable])
        if len(reachable) < config.server.quorum:
            return Selected(
                cause=too_few(len(reachable), config.server.quorum, "clients can be reached")
            )
        able, resting = awake(
            reachable,
            self.history.lost,
            server_round,
            least=count,
            most_rounds=config.server.backoff_rounds,
        )
        asked = choose(
            config.sampling.policy,
            able,
            math.ceil(count * (1.0 + config.server.over_selection) - 1e-9),
            history=self.history,
            server_round=server_round,
            seed=config.seed,
        )
        needed = min(count, len(asked))
        return Selected(client_ids=tuple(asked), needed=needed, resting=resting)

    def _wait(self, grid: Grid, roster: Roster) -> list[Reachable]:
        """Those that can be reached once they are a quorum, or when the wait is over."""
        clock = clock_of(grid)
        deadline = clock.now() + self.config.server.wait_seconds
        while True:
            nodes = set(grid.get_node_ids())
            found = [
                Reachable(
                    client_id=client_id,
                    num_examples=member.capability.num_examples,
                    rank_class=member.rank_class.name,
                )
                for client_id, member in roster.members.items()
                if member.node_id in nodes
            ]
            if len(found) >= self.config.server.quorum or clock.now() >= deadline:
                return found
            clock.wait_for_nodes(deadline)


def wait_for_nodes(grid: Grid, config: Config) -> list[int]:
    """All nodes that are there, once they are ``server.min-nodes``.

    Raises:
        UserError: fewer came in ``server.wait-seconds``.
    """
    clock = clock_of(grid)
    deadline = clock.now() + config.server.wait_seconds
    while len(nodes := list(grid.get_node_ids())) < config.server.min_nodes:
        if clock.now() >= deadline:
            raise UserError(
                f"{len(nodes)} nodes are connected after {config.server.wait_seconds:g} s, "
                f"expected {config.server.min_nodes}; start more or lower server.min-nodes."
            )
        clock.wait_for_nodes(deadline)
    return sorted(nodes)


def too_few(count: int, quorum: int, what: str) -> str:
    """The sentence of a round that changes nothing."""
    return f"skipped: {count} {what}, server.quorum is {quorum}; the round changes nothing"
