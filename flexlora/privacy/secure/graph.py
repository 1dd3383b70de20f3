"""Which clients of a group mask each other, and how many of them can take a mask away.

In a complete graph every client has a mask with every other, and work grows with the square of the
clients. SecAgg+ (Bell et al. 2020, eprint 2020/704) connects each to ``degree`` neighbours: on a
circle in random order, half of them on each side.

``threshold`` is the majority of a client's neighbours. A smaller part of them, even if all of these
work with the server, cannot open what it sent; and where a server calls a client alive to some and
dropped out to others, at most one of its two secrets has so many shares. What a majority bears is
that just under half of the clients stay silent. ``degree`` is chosen so that a round in which
``SILENT`` of the clients do, at random, fails once in ``1 / FAILURES`` times.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import comb

from flexlora.seeds import numpy_generator

__all__ = ["degree", "neighbours", "threshold"]

SILENT = 0.3  # share of the clients
FAILURES = 1e-3
LARGEST_COMPLETE = 32  # clients, an even number; below it a sparse graph saves nothing that matters


def threshold(count: int) -> int:
    """The shares that open a secret that ``count`` neighbours hold."""
    return count // 2 + 1


@lru_cache(maxsize=256)
def degree(clients: int) -> int:
    """The neighbours of each client in a group: all others, or an even number of them.

    By the union bound over the clients, each of which needs a threshold of neighbours that answer;
    those that do are a hypergeometric number.
    """
    if clients <= LARGEST_COMPLETE:
        return clients - 1
    answering = round((1 - SILENT) * (clients - 1))
    for count in range(LARGEST_COMPLETE, clients - 1, 2):
        if clients * _fewer(threshold(count), clients - 1, answering, count) <= FAILURES:
            return count
    return clients - 1


def _fewer(least: int, others: int, answering: int, count: int) -> float:
    """The chance that of ``count`` among ``others`` fewer than ``least`` are answering ones."""
    ways = (comb(answering, k) * comb(others - answering, count - k) for k in range(least))
    return sum(ways) / comb(others, count)


def neighbours(members: Sequence[int], seed: int) -> dict[int, list[int]]:
    """The neighbours of every member, ascending: mutual, and as many for all."""
    ordered, count = sorted(members), degree(len(members))
    if count == len(ordered) - 1:
        return {member: [other for other in ordered if other != member] for member in ordered}
    circle = [ordered[k] for k in numpy_generator(seed, "graph").permutation(len(ordered))]
    found = {}
    for at, member in enumerate(circle):
        steps = range(1, count // 2 + 1)
        sides = (circle[(at + sign * step) % len(circle)] for step in steps for sign in (1, -1))
        found[member] = sorted(sides)
    return found
