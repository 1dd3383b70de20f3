"""Which requests of a secure sum a client refuses by their values.

They protect against a server that errs or asks too much, as far as one client can see it. One that
lies about keys, or gives all clients the same false list of who answered, is not detected
(``docs/privacy.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.errors import UserError
from flexlora.privacy.secure.masks import KEY_BYTES
from flexlora.wire.secure_messages import MaskRequest, SharesRequest, UnmaskRequest

__all__ = ["MOST_BANDS", "Agreed", "check_mask", "check_shares", "check_unmask", "holding"]

MOST_BANDS = 64  # of a round: bits that name those of a box


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What the client's own configuration says; a request that says otherwise is refused.

    A ``clip`` of None moves from round to round.
    """

    seed: int
    clip: float | None
    min_group: int


def holding(graph: SharesRequest, request: MaskRequest) -> list[int]:
    """The holders that are asked to train too."""
    alive = set(request.alive)
    return [place for place in graph.holders if place in alive]


def check_shares(request: SharesRequest, agreed: Agreed) -> None:
    """Refuse a graph that is too small, and values other than this client's configuration says."""
    for name in ("seed", "clip", "min_group"):
        theirs, ours = getattr(request, name), getattr(agreed, name)
        if ours is not None and theirs != ours:
            raise UserError(
                f"the server's {name.replace('_', '-')} is {theirs}, this client's configuration "
                f"says {ours}."
            )
    peers, holders, bands = set(request.peers), set(request.holders), request.bands
    sizes = (
        (len(request.masks), KEY_BYTES * len(request.peers)),
        (len(request.channels), KEY_BYTES * len(request.holders)),
        (len(request.sizes), len(bands)),
        (len(request.counts), len(bands)),
        (sum(request.counts), len(request.graph)),
        (len(peers), len(request.peers)),
        (len(holders), len(request.holders)),
    )
    shaped = all(got == expected for got, expected in sizes) and bands[:1] == (0,)
    if not shaped or len(set(bands)) != len(bands) or max(bands) >= MOST_BANDS:
        raise UserError("the graph's lists do not fit each other.")
    inside = all(set(places) <= peers - {request.place} for places in request.neighbours.values())
    if not inside or set(request.neighbours[0]) != holders or request.place == 0:
        raise UserError("the graph names neighbours without keys, or the client itself.")
    if not len(holders) // 2 < request.threshold <= len(holders):
        raise UserError(
            f"{request.threshold} of {len(holders)} shares open a secret, expected more than half."
        )
    _check_groups(request, peers, bands)


def check_mask(request: MaskRequest, graph: SharesRequest) -> None:
    """Refuse neighbours and bands that the shares were not made for, and too few of them."""
    alive, bands = set(request.alive), list(request.bands)
    if not (alive <= set(graph.peers) and len(alive) == len(request.alive)):
        raise UserError("clients are named that are no neighbours, or twice.")
    if bands[:1] != [0] or not set(bands) <= set(graph.bands) or len(set(bands)) != len(bands):
        raise UserError(f"the bands are {bands}, expected 0 first of {list(graph.bands)}.")
    holders = holding(graph, request)
    if len(holders) < graph.threshold:
        raise UserError(
            f"{len(holders)} neighbours hold shares, expected at least {graph.threshold}: the "
            "masks could not be taken away."
        )
    if len(holders) != len(request.boxes):
        raise UserError(f"{len(request.boxes)} boxes came, expected {len(holders)}.")
    _check_groups(graph, alive, request.bands)


def check_unmask(request: UnmaskRequest, graph: SharesRequest, mask: MaskRequest) -> None:
    alive, dropped = set(request.alive), set(request.dropped)
    if alive & dropped:
        raise UserError(
            f"client {min(alive & dropped)} is said to have answered and to have dropped out; both "
            "kinds of shares together would show its update."
        )
    if alive | dropped != set(mask.alive) or len(alive) + len(dropped) != len(mask.alive):
        raise UserError("the clients to unmask are not those that were asked to train.")
    if not set(request.bands) <= set(mask.bands) | (set(range(MOST_BANDS)) - set(graph.bands)):
        raise UserError("a band is to be opened that was not sent.")
    holders = len(alive & set(graph.holders))
    if holders < graph.threshold:
        raise UserError(f"{holders} neighbours answered, expected at least {graph.threshold}.")
    _check_groups(graph, alive, request.bands)


def _check_groups(graph: SharesRequest, alive: set[int], bands: Sequence[int]) -> None:
    """Refuse a band in which too few clients would be summed, as far as its neighbours show."""
    for band in set(bands) & set(graph.bands):
        count = 1 + len(alive & set(graph.neighbours[band]))
        if count < graph.min_group:
            raise UserError(
                f"band {band} would sum {count} clients, expected at least {graph.min_group} "
                "(privacy.min-group)."
            )
