"""Rank collapse as a law, without any training: what a round makes of ``G`` when nobody learned.

With ``c_j`` the share of the weight that clients of rank >= j hold (arXiv 2602.13486),

    flexlora              sum_k p_k T_{r_k}(G) = U diag(S * c) Vh, so sigma_j <- c_j sigma_j
    residual, carried     G <- G + eta sum_k p_k (T_{r_k}(G) - T_{r_k}(G)) = G, so sigma_j stays

``c`` does not increase with j, so the order of the directions stays too. Rounds go through the real
methods: starts over a float64 wire, updates that come back as they were sent, checked and added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexlora.aggregation import make_method
from flexlora.aggregation.engine.method import Method
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.starts import Factoring, Start
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update, check_update
from flexlora.algebra.linalg import FactoredSVD
from flexlora.lora.ranks import RankClass, quotas
from flexlora.planning.rank_policies import PAPER_SHARES, paper_types
from flexlora.seeds import generator
from flexlora.wire.encoding import over_the_wire

__all__ = ["CASES", "COLLAPSES", "Case", "Measured", "measure"]

COLLAPSES = {"flexlora": True, "residual": False, "carried": False}
ATTENTION, MLP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
BEYOND = 4  # directions of G that no client has the rank for


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rank classes, the share of the clients in each, and the rows that a client of each holds."""

    title: str
    classes: tuple[RankClass, ...]
    shares: tuple[float, ...]
    examples: tuple[int, ...]
    num_clients: int = 20
    shapes: tuple[tuple[str, tuple[int, int]], ...] = ((ATTENTION, (64, 48)), (MLP, (96, 64)))

    def clients(self) -> list[tuple[str, RankClass, int]]:
        """``(client_id, rank class, num_examples)`` of everybody."""
        counts = quotas(self.shares, self.num_clients)
        kinds = zip(self.classes, counts, self.examples, strict=True)
        dealt = [(kind, rows) for kind, count, rows in kinds for _ in range(count)]
        return [(f"client_{k:02d}", kind, rows) for k, (kind, rows) in enumerate(dealt)]

    def bands(self) -> list[int]:
        """The first direction of attention that each class has no rank for."""
        shape = dict(self.shapes)[ATTENTION]
        return sorted({kind.rank_of(ATTENTION, *shape) + 1 for kind in self.classes})

    def shares_of_weight(self, module: str, count: int) -> Tensor:
        """``c [count]``: of all rows, the part with clients that train direction j, from j = 1."""
        clients, shape = self.clients(), dict(self.shapes)[module]
        ranks = torch.tensor([kind.rank_of(module, *shape) for _, kind, _ in clients])
        rows = torch.tensor([rows for _, _, rows in clients], dtype=torch.float64)
        directions = torch.arange(1, count + 1)
        return (rows[:, None] * (ranks[:, None] >= directions)).sum(0) / rows.sum()


def _of(title: str, ranks: Sequence[int], shares: Sequence[float], rows: Sequence[int]) -> Case:
    classes = tuple(RankClass.of(rank) for rank in ranks)
    return Case(title=title, classes=classes, shares=tuple(shares), examples=tuple(rows))


CASES = (
    _of("8/32 at 80/20 %", (8, 32), (0.8, 0.2), (30, 30)),
    _of("2/8/16 at 80/10/10 %", (2, 8, 16), (0.8, 0.1, 0.1), (30, 30, 30)),
    _of("4/16 at 50/50 %, weak clients hold 4 rows to 1", (4, 16), (0.5, 0.5), (40, 10)),
    Case(
        title="the paper's types, heavy-tail-light",
        classes=paper_types(),
        shares=PAPER_SHARES["paper:heavy-tail-light"],
        examples=(30, 30, 30, 30),
        shapes=((ATTENTION, (256, 224)), (MLP, (320, 256))),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Singular values by module, ``[rounds + 1, g]``: seen, and as the law has them."""

    seen: Mapping[str, Tensor]
    predicted: Mapping[str, Tensor]

    def worst(self) -> float:
        """Largest relative distance of any value from the law; from 0, relative to sigma_1."""
        return max(
            float(((self.seen[name] - law).abs() / torch.where(law > 0, law, law[0, 0])).max())
            for name, law in self.predicted.items()
        )

    def band(self, direction: int, module: str = ATTENTION) -> dict[str, Any]:
        """The share of one value that is left after each round, by the law and as seen."""
        pair = (("predicted", self.predicted), ("seen", self.seen))
        values = {key: of[module][:, direction - 1] for key, of in pair}
        shares = {key: (own / own[0]).tolist() for key, own in values.items()}
        return {"direction": direction, **shares}


def measure(case: Case, method: str, *, rounds: int, seed: int, collapses: bool) -> Measured:
    """Run ``rounds`` of ``method`` in which nobody trains, beside the law that it should follow."""
    state = _synthetic(case, seed)
    made = make_method(method)
    spectra = {name: [svd.S] for name, svd in state.change.items()}
    for _ in range(rounds):
        state = _untrained_round(made, state, case, seed)
        for name, svd in state.change.items():
            spectra[name].append(_padded(svd.S, spectra[name][0].shape[0]))
    seen = {name: torch.stack(values) for name, values in spectra.items()}
    powers = torch.arange(rounds + 1, dtype=torch.float64)[:, None]
    predicted = {}
    for name, values in seen.items():
        share = case.shares_of_weight(name, values.shape[1]) if collapses else torch.ones(1)
        predicted[name] = values[0] * share.double() ** powers
    return Measured(seen=seen, predicted=predicted)


def _synthetic(case: Case, seed: int) -> State:
    """A random ``G`` with values from 1 down to 0.5, of higher rank than anybody trains."""
    modules = {}
    for name, shape in case.shapes:
        rank = max(kind.rank_of(name, *shape) for kind in case.classes) + BEYOND
        rank = min(rank, *shape)
        modules[name] = FactoredSVD(
            U=_orthonormal(shape[0], rank, seed, "U", name),
            S=torch.linspace(1.0, 0.5, rank, dtype=torch.float64),
            Vh=_orthonormal(shape[1], rank, seed, "V", name).T.contiguous(),
        )
    return State(round=0, change=GlobalChange(modules))


def _orthonormal(size: int, rank: int, seed: int, *purpose: str) -> Tensor:
    draws = torch.randn(
        size, rank, generator=generator(seed, "rank-law", *purpose), dtype=torch.float64
    )
    return torch.linalg.qr(draws)[0]


def _untrained_round(method: Method, state: State, case: Case, seed: int) -> State:
    """One round in which every client sends back what it was sent."""
    clients = case.clients()
    factoring = Factoring(alpha=16.0, seed=seed)
    starts = {kind.name: _received(method.start(state, kind, factoring)) for kind in case.classes}
    opened = OpenRound(method, state, starts, {client: kind.name for client, kind, _ in clients})
    for client, kind, rows in clients:
        start = starts[kind.name]
        update = Update(
            client_id=client,
            adapter=start.trained,
            num_examples=rows,
            rank_class=kind.name,
            base_round=state.round,
            digest=start.digest,
        )
        check_update(update, start.trained, digest=start.digest)
        opened.add(update)
    return opened.close()


def _received(start: Start) -> Start:
    trained = over_the_wire(start.trained, "float64")
    carried = over_the_wire(start.carried, "float64") if start.carried is not None else None
    return replace(start, trained=trained, carried=carried).sealed()


def _padded(S: Tensor, count: int) -> Tensor:
    """``S`` with zeros for the directions that are gone."""
    return torch.nn.functional.pad(S.double(), (0, count - S.shape[0]))
