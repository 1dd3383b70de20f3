"""A whole secure sum in memory: both sides' objects, their messages as values, and drop-outs.

``SecureRound(...).run(...)`` keeps what each client sent before masks, so that a test can compare
the sums with the plain ones.
"""

from __future__ import annotations

import numpy as np
import torch

from flexlora.clients.secure.request_checks import Agreed
from flexlora.clients.secure.session import ClientSession
from flexlora.lora.ranks import RankClass
from flexlora.privacy.secure.bands import bands_of
from flexlora.privacy.secure.packing import pack_bits
from flexlora.privacy.secure.sum_plan import SumPlan
from flexlora.server.rounds.secure_sum import SecureSum, Terms
from flexlora.wire.secure_messages import from_values, to_values

SHAPES = {"attn.q": (12, 12), "attn.v": (6, 12), "mlp.up": (20, 12)}
RANKS = (2, 3, 7)


def travelled(message):
    """The message as the other side reads it."""
    return from_values(type(message), to_values(message))


class SecureRound:
    """``count`` clients whose ranks are dealt in turn, with random matrices and weights."""

    def __init__(
        self, count, *, shapes=SHAPES, ranks=RANKS, clip=1.0, min_group=3, seed=0, pooled=False
    ):
        self.shapes, draws = shapes, np.random.default_rng(seed)
        self.classes = {k: RankClass.of(ranks[k % len(ranks)]) for k in range(1, count + 1)}
        self.weights = {k: int(draws.integers(1, 40)) for k in self.classes}
        self.losses = {k: float(draws.uniform(0.1, 4.0)) for k in self.classes}
        noise = torch.Generator().manual_seed(seed)
        self.matrices = {
            k: {
                name: 0.05 * torch.randn(shapes[name][0], rank, generator=noise).double()
                for name, rank in rank_class.ranks(shapes).items()
            }
            for k, rank_class in self.classes.items()
        }
        self.terms = Terms(
            server_round=4,
            seed=11,
            clip=clip,
            largest=max(self.weights.values()),
            min_group=min_group,
            pooled=pooled,
        )
        self.server = SecureSum(self.terms, self.classes, shapes)
        self.sessions, self.plain, self.sent = {}, {}, {}

    def agreed(self):
        terms = self.terms
        return Agreed(seed=terms.seed, clip=terms.clip, min_group=terms.min_group)

    def plan(self, graph, mask):
        """The client's view of the sum: classes come with the request, sizes with the graph."""
        ranks = {c.name: c.ranks(self.shapes) for c in set(self.classes.values())}
        bands = dict(enumerate(bands_of(ranks, pooled=graph.pooled)))
        return SumPlan(
            rows={name: out for name, (out, _) in self.shapes.items()},
            bands={band: bands[band] for band in mask.bands},
            sizes=dict(zip(graph.bands, graph.sizes, strict=True)),
            seed=graph.seed,
            clip=graph.clip,
            largest=graph.largest,
        )

    def numbers(self, place):
        def make(graph, mask, generator):
            made = self.plan(graph, mask).numbers(
                self.matrices[place],
                weight=self.weights[place],
                loss=self.losses[place],
                generator=generator,
            )
            self.plain[place] = {band: values.copy() for band, values in made.items()}
            return made

        return make

    def keys(self, silent=()):
        for place, request in self.server.keys_requests().items():
            session = self.sessions[place] = ClientSession.begun(request)
            if place not in silent:
                self.server.add_keys(place, travelled(session.keys(travelled(request))))

    def shares(self, silent=(), spoil=lambda place, reply: reply):
        for place, request in self.server.shares_requests().items():
            reply = self.sessions[place].shares(travelled(request), self.agreed())
            if place not in silent:
                self.server.add_shares(place, spoil(place, travelled(reply)))

    def masked(self, silent=()):
        for place, request in self.server.mask_requests().items():
            made = self.sessions[place].masked(travelled(request), self.numbers(place))
            grids = self.server.plan.grids
            data = b"".join(pack_bits(values, grids[band].bits) for band, values in made.items())
            self.sent[place] = data
            if place not in silent:
                self.server.add_masked(place, data)

    def unmask(self, silent=(), spoil=lambda place, reply: reply):
        for place, request in self.server.unmask_requests().items():
            if place not in silent:
                reply = self.sessions[place].unmask(travelled(request))
                self.server.add_unmask(place, spoil(place, travelled(reply)))

    def run(self, *, keys=(), shares=(), masked=(), unmask=()):
        """The sums, with these clients silent from that phase on."""
        self.keys(keys)
        self.shares(shares)
        self.masked(masked)
        self.unmask(unmask)
        return self.server.opened()

    def plain_totals(self, places):
        """By band the sums, without masks, of what these clients sent."""
        totals = {}
        for place in places:
            for band, values in self.plain[place].items():
                totals[band] = totals.get(band, 0) + values.astype(np.int64)
        return totals
