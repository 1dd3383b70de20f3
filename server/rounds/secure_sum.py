"""The server's side of one secure sum: keys, shares, masked numbers, unmasking; then the sums.

    clients of the round  ->  keys came  ->  shares came (asked to train)  ->  numbers came (alive)

A client that is missing in one phase is in none of the later ones. Of those alive the seeds of
their own masks are put together from their neighbours' shares, of those that were asked to train
and sent nothing their mask keys, whose masks with the others are then in the sum alone. Nothing is
opened of a client that is alive to the server but its seeds, nor of another but its key.

Memory is one accumulator for each band, however many clients there are.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flexlora.errors import UpdateRefused
from flexlora.lora.ranks import RankClass
from flexlora.privacy.secure.bands import Band, bands_of
from flexlora.privacy.secure.graph import neighbours, threshold
from flexlora.privacy.secure.masks import (
    KEY_BYTES,
    add_mask,
    derived,
    shared_keys,
)
from flexlora.privacy.secure.packing import packed_bytes, unpack_bits
from flexlora.privacy.secure.sum_plan import FIRST, Opened, SumPlan
from flexlora.server.rounds.secure_secrets import SharedSecrets, SumFailed
from flexlora.wire.secure_messages import (
    SESSION_BYTES,
    KeysReply,
    KeysRequest,
    MaskedNote,
    MaskRequest,
    SharesReply,
    SharesRequest,
    UnmaskReply,
    UnmaskRequest,
)

__all__ = ["SecureSum", "Terms", "band_note"]

GRAPH_BITS = 63


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The public values of a round: see ``SharesRequest``."""

    server_round: int
    seed: int
    clip: float
    largest: int
    min_group: int
    pooled: bool = False


class SecureSum:
    """One round; the phases are called in order, replies are added as they come.

    Args:
        classes: the rank class of every client by place.
        all_classes: those that make the bands; default: those of the round.
        shapes: ``(out_features, in_features)`` of every module.
    """

    def __init__(
        self,
        terms: Terms,
        classes: Mapping[int, RankClass],
        shapes: Mapping[str, tuple[int, int]],
        all_classes: Mapping[str, RankClass] | None = None,
    ) -> None:
        self.terms, self.shapes = terms, shapes
        self.session = secrets.token_bytes(SESSION_BYTES)
        self._graph_seed = secrets.randbits(GRAPH_BITS)
        self._clients = {
            place: SharedSecrets(rank_class=c.name) for place, c in sorted(classes.items())
        }
        self.rank_classes = dict(all_classes or {c.name: c for c in classes.values()})
        ranks = {n: c.ranks(shapes) for n, c in self.rank_classes.items()}
        found = bands_of(ranks, pooled=terms.pooled)
        self.bands: dict[int, Band] = dict(enumerate(found))
        self._graphs: dict[int, dict[int, list[int]]] = {}
        self._sizes: dict[int, int] = {}
        self.opened_bands: tuple[int, ...] = ()
        self.keyed: list[int] = []
        self.asked: list[int] = []  # to train
        self.alive: list[int] = []  # sent numbers
        self.wrong: dict[int, int] = {}  # clients whose shares were wrong, and how many
        self.left_out: dict[int, int] = {}  # bands of too few clients, and how many

    # --- keys ----------------------------------------------------------------------------------

    def keys_requests(self) -> dict[int, KeysRequest]:
        """By place, for every client."""
        request = KeysRequest(server_round=self.terms.server_round, session=self.session)
        return dict.fromkeys(self._clients, request)

    def add_keys(self, place: int, reply: KeysReply) -> None:
        """
        Raises:
            UpdateRefused: of another round, or no keys; as in all phases.
        """
        self.check_session(reply)
        for key in (reply.channel, reply.mask):
            _check_key(key)
        self._clients[place].keys = reply
        self.keyed.append(place)

    # --- shares --------------------------------------------------------------------------------

    def shares_requests(self) -> dict[int, SharesRequest]:
        """By place, for the clients whose keys came.

        Raises:
            SumFailed: too few of them.
        """
        self.keyed.sort()
        self._limit(self.keyed, "gave keys")
        for band in self.bands:
            members = self._members(band, self.keyed)
            if band not in self.left_out:
                self._graphs[band] = neighbours(members, self._graph_seed + band)
                self._sizes[band] = len(members)
        return {place: self._shares_request(place) for place in self.keyed}

    def _shares_request(self, place: int) -> SharesRequest:
        client, graphs = self._clients[place], self._graphs
        bands = tuple(band for band, graph in graphs.items() if place in graph)
        peers = sorted({peer for band in bands for peer in graphs[band][place]})
        client.holders = tuple(graphs[FIRST][place])
        return SharesRequest(
            server_round=self.terms.server_round,
            session=self.session,
            place=place,
            threshold=threshold(len(client.holders)),
            holders=client.holders,
            channels=b"".join(self._clients[peer].public.channel for peer in client.holders),
            peers=tuple(peers),
            masks=b"".join(self._clients[peer].public.mask for peer in peers),
            bands=bands,
            sizes=tuple(self._sizes[band] for band in bands),
            counts=tuple(len(graphs[band][place]) for band in bands),
            graph=tuple(peer for band in bands for peer in graphs[band][place]),
            seed=self.terms.seed,
            clip=self.terms.clip,
            largest=self.terms.largest,
            min_group=self.terms.min_group,
            pooled=self.terms.pooled,
        )

    def add_shares(self, place: int, reply: SharesReply) -> None:
        """Hold a client's boxes for those they are for."""
        self.check_session(reply)
        client = self._clients[place]
        bands = [band for band, graph in self._graphs.items() if place in graph]
        if len(reply.boxes) != len(client.holders) or len(reply.digests) != len(bands):
            raise UpdateRefused(
                f"{len(reply.boxes)} boxes and {len(reply.digests)} digests, expected "
                f"{len(client.holders)} and {len(bands)}."
            )
        client.boxes = dict(zip(client.holders, reply.boxes, strict=True))
        client.digests = dict(zip(bands, reply.digests, strict=True))
        self.asked.append(place)

    # --- masked numbers ------------------------------------------------------------------------

    def mask_requests(self) -> dict[int, MaskRequest]:
        """By place, for the clients that are asked to train.

        Raises:
            SumFailed: too few of them.
        """
        self.asked = self._connected(sorted(self.asked))
        self._limit(self.asked, "shared their secrets")
        plan = self.plan
        self.totals = {band: np.zeros(plan.length(band), np.uint32) for band in plan.bands}
        self._counts = dict.fromkeys(plan.bands, 0)
        return {place: self._mask_request(place) for place in self.asked}

    def _connected(self, places: Sequence[int]) -> list[int]:
        """The clients of whom enough holders are left to put their secrets together."""
        left = set(places)
        while True:
            short = {
                place
                for place in left
                if len(left & set(self._clients[place].holders)) < self._clients[place].threshold
            }
            if not short:
                return sorted(left)
            left -= short

    def _mask_request(self, place: int) -> MaskRequest:
        alive = sorted(self._peers(place) & set(self.asked))
        return MaskRequest(
            server_round=self.terms.server_round,
            session=self.session,
            alive=tuple(alive),
            boxes=tuple(
                self._clients[peer].boxes[place]
                for peer in self._clients[place].holders
                if peer in alive
            ),
            classes=json.dumps([c.to_dict() for c in self.rank_classes.values()]),
            bands=self.bands_of(place),
        )

    @cached_property
    def plan(self) -> SumPlan:
        """What clients compute from the same values, from when it is fixed who trains."""
        return SumPlan(
            rows={name: out for name, (out, _) in self.shapes.items()},
            bands={b: band for b, band in self.bands.items() if b not in self.left_out},
            sizes=self._sizes,
            seed=self.terms.seed,
            clip=self.terms.clip,
            largest=self.terms.largest,
        )

    @property
    def degrees(self) -> dict[int, int]:
        """By band, the neighbours of each of its clients."""
        graphs = self._graphs.items()
        return {band: max(map(len, graph.values()), default=0) for band, graph in graphs}

    def bands_of(self, place: int) -> tuple[int, ...]:
        """The bands that a client sends."""
        graphs = self._graphs.items()
        return tuple(b for b, graph in graphs if place in graph and b not in self.left_out)

    def most_bytes(self, place: int) -> int:
        """Of a client's masked numbers."""
        plan = self.plan
        return sum(
            packed_bytes(plan.length(band), plan.grids[band].bits) for band in self.bands_of(place)
        )

    def add_masked(self, place: int, data: bytes | memoryview) -> None:
        """Add one client's numbers, packed band after band."""
        if place not in self.asked or place in self.alive:
            raise UpdateRefused("masked numbers came that were not asked for.")
        expected, plan = self.most_bytes(place), self.plan
        if len(data) != expected:
            raise UpdateRefused(f"{len(data):,} bytes of masked numbers, expected {expected:,}.")
        at = 0
        for band in self.bands_of(place):
            bits, count = plan.grids[band].bits, plan.length(band)
            size = packed_bytes(count, bits)
            self.totals[band] += unpack_bits(data[at : at + size], bits, count)
            self._counts[band] += 1
            at += size
        self.alive.append(place)

    # --- unmasking -----------------------------------------------------------------------------

    def unmask_requests(self) -> dict[int, UnmaskRequest]:
        """By place, for the clients whose numbers came.

        Raises:
            SumFailed: too few of them.
        """
        self.alive.sort()
        self._limit(self.alive, "sent masked updates")
        bands = tuple(band for band in self.totals if band not in self.left_out)
        alive, self.opened_bands = set(self.alive), bands
        requests = {}
        for place in self.alive:
            peers = self._peers(place) & set(self.asked)
            requests[place] = UnmaskRequest(
                server_round=self.terms.server_round,
                session=self.session,
                alive=tuple(sorted(peers & alive)),
                dropped=tuple(sorted(peers - alive)),
                bands=bands,
            )
        return requests

    def add_unmask(self, place: int, reply: UnmaskReply) -> None:
        """Note the shares that a client holds of others."""
        self.check_session(reply)
        held = [peer for peer in self._clients[place].holders if peer in self.asked]
        alive = [peer for peer in held if peer in self.alive]
        dropped = [peer for peer in held if peer not in self.alive]
        if len(reply.seeds) != len(alive) or len(reply.keys) != len(dropped):
            raise UpdateRefused(
                f"shares of {len(reply.seeds)} and {len(reply.keys)} clients, expected "
                f"{len(alive)} and {len(dropped)}."
            )
        taken = [
            self._clients[peer].add_seeds(place, text, self._open_bands_of(peer))
            for peer, text in zip(alive, reply.seeds, strict=True)
        ]
        taken += [
            self._clients[peer].add_key(place, text)
            for peer, text in zip(dropped, reply.keys, strict=True)
        ]
        if wrong := taken.count(False):
            self.wrong[place] = wrong

    def _open_bands_of(self, place: int) -> list[int]:
        return [band for band in self.bands_of(place) if band in self.opened_bands]

    def opened(self) -> Opened:
        """The sums over the clients that are alive.

        Raises:
            SumFailed: a client's masks cannot be taken away.
        """
        for place in self.alive:
            for band in self._open_bands_of(place):
                seed = self._clients[place].seed(band)
                add_mask(self.totals[band], derived(seed, "own"), -1)
        for place in sorted(set(self.asked) - set(self.alive)):
            self._remove_pairs(place)
        plan, totals = self.plan, {}
        for band in self.opened_bands:
            totals[band] = self.totals[band] & np.uint32(2 ** plan.grids[band].bits - 1)
        return plan.opened(totals, self._counts)

    def _masked_with(self, place: int) -> Iterable[tuple[int, int]]:
        """Band and place of the clients in the sum that have a mask with this one in it."""
        alive = set(self.alive)
        for band in self.opened_bands:
            for peer in self._graphs[band].get(place, ()):
                if peer in alive:
                    yield band, peer

    def _remove_pairs(self, place: int) -> None:
        """The masks that a client that dropped out has with others, which nothing cancels."""
        pairs = list(self._masked_with(place))
        peers = sorted({peer for _, peer in pairs})
        if not peers:
            return
        publics = [self._clients[peer].public.mask for peer in peers]
        shared = dict(
            zip(peers, shared_keys(self._clients[place].mask_key(), publics), strict=True)
        )
        for band, peer in pairs:
            pair = derived(shared[peer], "pair", self.terms.server_round, band)
            add_mask(self.totals[band], pair, -1 if place > peer else 1)

    # --- helpers -------------------------------------------------------------------------------

    def _peers(self, place: int) -> set[int]:
        """The neighbours in any band that the shares were made for."""
        graphs = self._graphs.values()
        return {peer for graph in graphs for peer in graph.get(place, ())}

    def _members(self, band: int, places: Iterable[int]) -> list[int]:
        names = self.bands[band].classes
        return [place for place in places if self._clients[place].rank_class in names]

    def _limit(self, places: Sequence[int], did: str) -> None:
        """Leave out the bands of which too few clients are there."""
        least = self.terms.min_group
        if len(places) < least:
            raise SumFailed(f"{len(places)} clients {did}, expected {least} (privacy.min-group)")
        for band in self.bands:
            count = len(self._members(band, places))
            if count < least:
                self.left_out.setdefault(band, count)

    def check_session(self, reply: KeysReply | SharesReply | MaskedNote | UnmaskReply) -> None:
        """
        Raises:
            UpdateRefused: the reply is of another round or session.
        """
        if (reply.server_round, reply.session) != (self.terms.server_round, self.session):
            raise UpdateRefused("the reply is of another round, or of another session of it.")


def band_note(band: Band, count: int, least: int) -> str:
    """The sentence on a band that is not in the round."""
    spans = set(band.columns.values())
    first, last = min(spans)
    columns = f"columns {first + 1} to {last}" if len(spans) == 1 else "the upper columns"
    return f"{columns} left out: fewer than privacy.min-group={least} clients have them ({count})"


def _check_key(key: bytes) -> None:
    try:
        if len(key) == KEY_BYTES:
            shared_keys(secrets.token_bytes(KEY_BYTES), [key])
            return
    except ValueError:
        pass
    raise UpdateRefused(f"a public key of {len(key)} bytes that is none.")
