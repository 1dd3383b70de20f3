"""Nodes whose messages get lost sit out: 1, 2, 4 ... rounds, until one of them is answered.

A round that asks a dead node waits for it until its patience is over. What is remembered is part of
the checkpoint, so that a resumed run leaves out the same clients. A round never gets smaller than
is wanted by this: where too few others are there, those who have waited longest are asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexlora.server.members.sampling import Reachable

__all__ = ["Losses", "awake", "resting"]

Losses = Mapping[str, tuple[int, int]]  # client id: losses in a row, the round of the last one


def resting(lost: Losses, server_round: int, most_rounds: int) -> dict[str, str]:
    """The clients that sit out ``server_round``, each with the reason."""
    causes = {}
    for client_id, (losses, last) in lost.items():
        until = last + min(most_rounds, 2 ** min(losses - 1, most_rounds.bit_length()))
        if server_round <= until:
            times = "once" if losses == 1 else f"{losses} times in a row"
            causes[client_id] = f"sits out to round {until}: lost {times}, last in round {last}"
    return causes


def awake(
    reachable: Sequence[Reachable], lost: Losses, server_round: int, *, least: int, most_rounds: int
) -> tuple[list[Reachable], dict[str, str]]:
    """Who may be asked, at least ``least`` where so many can be reached, and who sits out why."""
    causes = resting(lost, server_round, most_rounds)
    asleep = [client for client in reachable if client.client_id in causes]
    asleep.sort(key=lambda client: (lost[client.client_id][1], client.client_id))
    missing = max(0, least - (len(reachable) - len(asleep)))
    woken = {client.client_id for client in asleep[:missing]}
    able = [c for c in reachable if c.client_id not in causes or c.client_id in woken]
    return able, {c.client_id: causes[c.client_id] for c in asleep[missing:]}
