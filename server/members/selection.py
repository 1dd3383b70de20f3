"""Select the clients of a round: wait for a quorum, apply back-off, sample more than needed.

Clients whose messages get lost sit out 1, 2, 4 ... rounds until one message is answered, since a
round that asks a dead node waits for it until its deadline. Where too few others can be reached,
those that have sat out longest are asked all the same. Losses are part of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from flexlora.config.resolve import Config
from flexlora.errors import TooFewNodes, UserError
from flexlora.server.members.roster import Roster
from flexlora.server.members.sampling import History, Reachable, choose, poisson_sample
from flexlora.server.members.waiting import Say, WaitReport
from flexlora.server.transport.backoff import backoff
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.link import Unreachable, link_of

__all__ = ["Selected", "Selector", "split_backing_off", "too_few", "wait_for_nodes"]


@dataclass(frozen=True, kw_only=True)
class Selected:
    """The clients to ask, how many updates are enough, and the cause of each client's back-off.

    ``skipped`` says why no client is asked.
    """

    client_ids: tuple[str, ...] = ()
    needed: int = 0
    skipped: str = ""
    backing_off: Mapping[str, str] = field(default_factory=dict)


class Selector:
    """Applies ``sampling.policy``, ``server.over-selection`` and ``server.quorum``."""

    def __init__(
        self,
        config: Config,
        history: History | None = None,
        say: Say = lambda what, seconds: None,
    ) -> None:
        self.config, self.history, self.say = config, history or History(), say
        self.seed = config.seed

    def select(self, grid: Grid, roster: Roster, server_round: int) -> Selected:
        """The clients of one round; none where fewer than the quorum can be reached in time."""
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
                skipped=too_few(len(reachable), config.server.quorum, "clients can be reached")
            )
        if config.sampling.policy == "poisson":
            return self._poisson(reachable, roster, server_round)
        able, backing_off = split_backing_off(
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
            seed=self.seed,
        )
        needed = min(count, len(asked))
        return Selected(client_ids=tuple(asked), needed=needed, backing_off=backing_off)

    def _poisson(
        self, reachable: Sequence[Reachable], roster: Roster, server_round: int
    ) -> Selected:
        """The sampled clients that can be asked; nobody takes the place of the others."""
        config = self.config
        sampled = poisson_sample(
            roster.members,
            config.fraction_train,
            cap=config.sampling.cap,
            seed=self.seed,
            server_round=server_round,
        )
        able, backing_off = split_backing_off(
            [client for client in reachable if client.client_id in sampled],
            self.history.lost,
            server_round,
            least=0,
            most_rounds=config.server.backoff_rounds,
        )
        asked = tuple(sorted(client.client_id for client in able))
        return Selected(client_ids=asked, needed=len(asked), backing_off=backing_off)

    def _wait(self, grid: Grid, roster: Roster) -> list[Reachable]:
        """The clients that can be reached once they are a quorum, or when the wait is over."""
        clock = clock_of(grid)
        deadline = clock.now() + self.config.server.wait_seconds
        waiting = WaitReport(self.say, clock, deadline)
        while True:
            try:
                nodes = link_of(grid).node_ids(deadline)
            except Unreachable:
                nodes = set()
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
            here = {client.client_id for client in found}
            what = f"{self.config.server.quorum - len(found)} more clients to be connected"
            waiting.report(what, sorted(roster.members.keys() - here))
            clock.wait_for_nodes(deadline)


def split_backing_off(
    reachable: Sequence[Reachable],
    lost: Mapping[str, tuple[int, int]],
    server_round: int,
    *,
    least: int,
    most_rounds: int,
) -> tuple[list[Reachable], dict[str, str]]:
    """The clients that may be asked (``least`` at least, if so many are reachable), and the others.

    ``lost`` holds, by client, the losses in a row and the round of the last one.
    """
    causes = {}
    for client_id, (losses, last) in lost.items():
        until = last + backoff(losses, most_rounds)
        if server_round <= until:
            times = "once" if losses == 1 else f"{losses} times in a row"
            causes[client_id] = f"sits out to round {until}: lost {times}, last in round {last}"
    out = [client for client in reachable if client.client_id in causes]
    out.sort(key=lambda client: (lost[client.client_id][1], client.client_id))
    missing = max(0, least - (len(reachable) - len(out)))
    sitting_out = {client.client_id: causes[client.client_id] for client in out[missing:]}
    return [client for client in reachable if client.client_id not in sitting_out], sitting_out


def wait_for_nodes(grid: Grid, config: Config, say: Say = lambda what, seconds: None) -> list[int]:
    """All connected nodes, once there are ``server.min-nodes``.

    Raises:
        TooFewNodes: fewer came in ``server.wait-seconds``.
    """
    clock = clock_of(grid)
    deadline = clock.now() + config.server.wait_seconds
    waiting = WaitReport(say, clock, deadline)
    while len(nodes := _reached(grid, deadline)) < config.server.min_nodes:
        if clock.now() >= deadline:
            raise TooFewNodes(
                f"{len(nodes)} nodes are connected after {config.server.wait_seconds:g} s, "
                f"expected {config.server.min_nodes}; start more or lower server.min-nodes."
            )
        waiting.report(f"nodes, {len(nodes)} of {config.server.min_nodes} are connected")
        clock.wait_for_nodes(deadline)
    return sorted(nodes)


def _reached(grid: Grid, deadline: float) -> set[int]:
    try:
        return link_of(grid).node_ids(deadline)
    except Unreachable as error:
        raise UserError(
            f"the SuperLink has not answered within server.wait-seconds: {error}; is it running?"
        ) from None


def too_few(count: int, quorum: int, what: str) -> str:
    """Why a round changes nothing."""
    return f"skipped: {count} {what}, server.quorum is {quorum}; the round changes nothing"
