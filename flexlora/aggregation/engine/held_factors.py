"""State of methods that average factors: ``A`` and ``s B``; clients start from their first rows.

A client of rank r starts from the first r rows and columns; in round one from a random ``lora_A``
that is nested across ranks. ``G`` is the product of the stored factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from flexlora.aggregation.engine.factor_sums import Pair
from flexlora.aggregation.engine.options import UNCAPPED, StepOptions
from flexlora.aggregation.engine.server_step import capped
from flexlora.aggregation.engine.starts import Factoring, Start
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Sums
from flexlora.algebra.decompose import MatrixSum
from flexlora.algebra.linalg import live_rows
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.seeds import generator

__all__ = [
    "add_changes",
    "add_columns",
    "first_rows",
    "held_factors",
    "hold",
    "known_factors",
    "widened",
]


def held_factors(state: State, name: str) -> Pair | None:
    """``A [R, in]`` and ``s B [out, R]`` of the state; None before the first round."""
    if f"lora_A/{name}" not in state.extra:
        return None
    return state.extra[f"lora_A/{name}"], state.extra[f"lora_B/{name}"]


def first_rows(state: State, ranks: Mapping[str, int], factoring: Factoring) -> Adapter:
    """The first rows and columns of the stored factors by rank, then random rows of ``lora_A``."""
    return Adapter({name: _first(state, name, rank, factoring) for name, rank in ranks.items()})


def _first(state: State, name: str, rank: int, factoring: Factoring) -> LoRAFactors:
    svd = state.change[name]
    out_features, in_features = svd.shape
    rows = live_rows(rank, in_features, generator(factoring.seed, "live", name))
    lora_A, lora_B = rows.to(svd.Vh), svd.U.new_zeros(out_features, rank)
    factors = LoRAFactors(
        lora_A=lora_A, lora_B=lora_B, alpha=factoring.alpha, rslora=factoring.rslora
    )
    stored = held_factors(state, name)
    if stored is not None:
        known = min(rank, stored[0].shape[0])
        lora_A[:known] = stored[0][:known].to(lora_A.dtype)
        lora_B[:, :known] = (stored[1][:, :known] / factors.scaling).to(lora_B.dtype)
    return factors


def add_changes(state: State, sums: Sums) -> State:
    """The next state: stored factors plus their mean changes, one of which is zero.

    Then the mean of the products' changes is the product of the mean, exactly: with A shared,
    ``sum_k p_k s_k (B_k - B) A``; with B shared, ``sum_k p_k s_k B (A_k - A)``.
    """
    factors = {}
    for name in state.change:
        A, B = sums.factor_changes.mean(name)
        last = known_factors(state, sums.sent, name)
        if last is None:  # without starts nothing was subtracted, and A itself is shared
            factors[name] = (sums.factor_changes.mean_of_holders(name)[0], B)
            continue
        rank = max(A.shape[0], last[0].shape[0])
        A, B = widened((A, B), rank)
        last_A, last_B = widened(last, rank)
        factors[name] = (A + last_A, B + last_B)
    return hold(state, factors)


def add_columns(state: State, sums: Sums) -> State:
    """The next state: the stored ``s B`` plus the linear sum, over the ``A`` that all share.

    Without known starts the updates may have several ``A``; their products are then stacked.
    """
    factors = {}
    for name in state.change:
        terms = sums.linear[name].terms
        last = known_factors(state, sums.sent, name)
        if last is None:
            A = torch.cat([A.double() for *_, A in terms], dim=0)
            factors[name] = A, torch.cat([columns for _, columns, _ in terms], dim=1)
            continue
        rank = max(last[0].shape[0], *(columns.shape[1] for _, columns, _ in terms))
        A, B = widened(last, rank)
        for _, columns, _ in terms:
            B = B + torch.nn.functional.pad(columns, (0, rank - columns.shape[1]))
        factors[name] = A, B
    return hold(state, factors)


def known_factors(state: State, sent: Mapping[str, Start], name: str) -> Pair | None:
    """The stored factors, extended to the largest rank that this round sent; None if neither."""
    starts = [s.trained[name] for s in sent.values() if s.base_round == state.round]
    stored = held_factors(state, name)
    if not starts:
        return stored
    widest = max(starts, key=lambda factors: factors.rank)
    A, B = widest.lora_A.double(), widest.scaling * widest.lora_B.double()
    if stored is not None:  # not the decoded ones, which a 16-bit wire has rounded
        known = stored[0].shape[0]
        A, B = widened((A, B), max(A.shape[0], known))
        A[:known], B[:, :known] = stored[0].double(), stored[1].double()
    return A, B


def widened(pair: Pair, rank: int) -> Pair:
    """``A`` and ``B`` with zero rows and columns up to ``rank``."""
    A, B = pair
    pad = torch.nn.functional.pad
    return pad(A, (0, 0, 0, rank - A.shape[0])), pad(B, (0, rank - B.shape[1]))


def hold(state: State, factors: Mapping[str, Pair]) -> State:
    """The state one round later with these factors; ``G`` is their products."""
    extra = dict(state.extra)
    sums = {}
    for name, (A, B) in factors.items():
        extra[f"lora_A/{name}"], extra[f"lora_B/{name}"] = A.contiguous(), B.contiguous()
        sums[name] = MatrixSum(shape=(B.shape[0], A.shape[1]), terms=((1.0, B, A),))
    return capped(replace(state, extra=extra), sums, StepOptions(server_max_rank=UNCAPPED))
