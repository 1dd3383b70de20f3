"""Weighted sums of the factors themselves, for the methods that average ``lora_A`` and ``lora_B``.

Factors of unequal rank are added row by row (column by column), each client counting in the rows
that it has; the scaling is absorbed into ``lora_B``, since another rank has another one. The server
keeps both means, and clients of rank r begin with the first r rows and columns, from a shared
``lora_A`` that is nested across ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flexlora.aggregation.engine.method import State
from flexlora.aggregation.engine.options import UNCAPPED, StepOptions
from flexlora.aggregation.engine.server_step import capped
from flexlora.aggregation.engine.starts import Factoring, LocalPlan, Start
from flexlora.algebra.decompose import MatrixSum
from flexlora.algebra.linalg import live_rows
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.ranks import RankClass
from flexlora.seeds import generator

__all__ = [
    "FactorSums",
    "Pair",
    "changed_state",
    "factor_adapter",
    "factor_start",
    "factor_state",
    "held_factors",
    "known_factors",
    "widened",
]

Pair = tuple[Tensor, Tensor]


class FactorSums:
    """``sum_k w_k A_k [R, in]``, ``sum_k w_k s_k B_k [out, R]``, and the weight of each row.

    Float64; R grows to the largest rank that was added.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.total = 0.0
        self._A = {
            n: torch.zeros(0, fan_in, dtype=torch.float64) for n, (_, fan_in) in shapes.items()
        }
        self._B = {n: torch.zeros(out, 0, dtype=torch.float64) for n, (out, _) in shapes.items()}
        self._weight = {n: torch.zeros(0, dtype=torch.float64) for n in shapes}

    def add(
        self,
        factors: Mapping[str, LoRAFactors],
        weight: float,
        rows: Mapping[str, Sequence[int]] | None = None,
        minus: Mapping[str, LoRAFactors] | None = None,
    ) -> None:
        """Add one client, less the factors ``minus`` that it started from.

        ``rows`` says which terms of the whole its own are (default: the first).
        """
        self.total += weight
        for name, own in factors.items():
            at = torch.as_tensor(list(rows[name] if rows else range(own.rank)), dtype=torch.long)
            self._grow(name, int(at.max()) + 1)
            A, B = own.lora_A.double(), own.scaling * own.lora_B.double()
            if minus is not None:
                A = A - minus[name].lora_A.double()
                B = B - minus[name].scaling * minus[name].lora_B.double()
            self._A[name][at] += weight * A
            self._B[name][:, at] += weight * B
            self._weight[name][at] += weight

    def _grow(self, name: str, rank: int) -> None:
        missing = rank - self._A[name].shape[0]
        if missing > 0:
            pad = torch.nn.functional.pad
            self._A[name] = pad(self._A[name], (0, 0, 0, missing))
            self._B[name] = pad(self._B[name], (0, missing))
            self._weight[name] = pad(self._weight[name], (0, missing))

    def mean(self, name: str) -> Pair:
        """``A [R, in]`` and ``s B [out, R]`` over all clients: a missing row counts as zeros."""
        return self._A[name] / self.total, self._B[name] / self.total

    def mean_of_holders(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The same over those clients that have the row, and whether anybody has."""
        weight = self._weight[name]
        divisor = torch.where(weight > 0, weight, 1.0)
        return self._A[name] / divisor[:, None], self._B[name] / divisor, weight > 0


def held_factors(state: State, name: str) -> Pair | None:
    """``A [R, in]`` and ``s B [out, R]`` that the state holds, None before the first round."""
    if f"lora_A/{name}" not in state.extra:
        return None
    return state.extra[f"lora_A/{name}"], state.extra[f"lora_B/{name}"]


def factor_adapter(state: State, ranks: Mapping[str, int], factoring: Factoring) -> Adapter:
    """The first rows and columns of what is held; live rows beyond those that there are."""
    return Adapter({name: _first(state, name, rank, factoring) for name, rank in ranks.items()})


def factor_start(
    state: State,
    rank_class: RankClass,
    factoring: Factoring,
    *,
    trainable: tuple[str, ...] = ("lora_A", "lora_B"),
    local: LocalPlan = LocalPlan(),
) -> Start:
    """The first rows and columns to train from, nothing carried."""
    return Start(
        rank_class=rank_class,
        base_round=state.round,
        trained=factor_adapter(state, rank_class.ranks(state.change.shapes), factoring),
        trainable=trainable,
        local=local,
    )


def _first(state: State, name: str, rank: int, factoring: Factoring) -> LoRAFactors:
    svd = state.change[name]
    out_features, in_features = svd.shape
    rows = live_rows(rank, in_features, generator(factoring.seed, "live", name))
    lora_A, lora_B = rows.to(svd.Vh.dtype), svd.U.new_zeros(out_features, rank)
    factors = LoRAFactors(
        lora_A=lora_A, lora_B=lora_B, alpha=factoring.alpha, rslora=factoring.rslora
    )
    held = held_factors(state, name)
    if held is not None:
        known = min(rank, held[0].shape[0])
        lora_A[:known] = held[0][:known].to(lora_A.dtype)
        lora_B[:, :known] = (held[1][:, :known] / factors.scaling).to(lora_B.dtype)
    return factors


def changed_state(state: State, sent: Mapping[str, Start], sums: FactorSums) -> State:
    """The held factors plus the mean changes in ``sums``, where one of the two is zero.

    Then the mean of the products' changes is the product of the mean, exactly: with A shared,
    ``sum_k p_k s_k (B_k - B) A``; with B shared, ``sum_k p_k s_k B (A_k - A)``.
    """
    held = {}
    for name in state.change:
        A, B = sums.mean(name)
        last = known_factors(state, sent, name)
        if last is None:  # nothing was subtracted: A itself is shared, by those who have the row
            held[name] = (sums.mean_of_holders(name)[0], B)
            continue
        rank = max(A.shape[0], last[0].shape[0])
        A, B = widened((A, B), rank)
        last_A, last_B = widened(last, rank)
        held[name] = (A + last_A, B + last_B)
    return factor_state(state, held)


def known_factors(state: State, sent: Mapping[str, Start], name: str) -> Pair | None:
    """What the state holds, and beyond that what the widest client of the round started from."""
    starts = [s.trained[name] for s in sent.values() if s.base_round == state.round]
    held = held_factors(state, name)
    if not starts:
        return held
    widest = max(starts, key=lambda factors: factors.rank)
    A, B = widest.lora_A.double(), widest.scaling * widest.lora_B.double()
    if held is not None:  # the state's own numbers where it has them: a 16-bit wire rounds them
        rank = max(A.shape[0], held[0].shape[0])
        known = held[0].shape[0]
        A, B = widened((A, B), rank)
        A[:known], B[:, :known] = held[0].double(), held[1].double()
    return A, B


def widened(pair: Pair, rank: int) -> Pair:
    """``A`` and ``B`` with zero rows and columns up to ``rank``."""
    A, B = pair
    pad = torch.nn.functional.pad
    return pad(A, (0, 0, 0, rank - A.shape[0])), pad(B, (0, rank - B.shape[1]))


def factor_state(state: State, held: Mapping[str, Pair]) -> State:
    """The state that holds these factors, its change their products."""
    extra = dict(state.extra)
    sums = {}
    for name, (A, B) in held.items():
        extra[f"lora_A/{name}"], extra[f"lora_B/{name}"] = A.contiguous(), B.contiguous()
        sums[name] = MatrixSum(shape=(B.shape[0], A.shape[1]), terms=((1.0, B, A),))
    return capped(replace(state, extra=extra), sums, StepOptions(server_max_rank=UNCAPPED))
