"""Clients that start from ``T_r(G)``: the start itself, what it took away, and which way it faces.

A truncation is known up to a rotation of its factors, ``(B Q^T)(Q A)``. With ``realign`` the new
factors of a class are turned towards those it was last sent, ``min_Q |Q A - A_last|_F`` over
orthogonal Q (Procrustes; Schoenemann, 1966), so that rows keep their meaning from round to round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from flexlora.aggregation.engine.method import State, Update
from flexlora.aggregation.engine.product_sums import factors_term
from flexlora.aggregation.engine.starts import Factoring, Start
from flexlora.algebra.decompose import Term
from flexlora.errors import UpdateRefused
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.ranks import RankClass

__all__ = [
    "StartedFrom",
    "of_this_round",
    "remember_rows",
    "truncated_adapter",
    "truncated_start",
    "turn_towards",
]


def truncated_start(state: State, rank_class: RankClass, factoring: Factoring) -> Start:
    """``T_r(G)`` to train from, nothing carried: what the published method sends."""
    trained = truncated_adapter(state, rank_class, factoring)
    return Start(rank_class=rank_class, base_round=state.round, trained=trained)


def truncated_adapter(state: State, rank_class: RankClass, factoring: Factoring) -> Adapter:
    """``T_r(G)`` as factors, turned towards the rows last sent where these are kept."""
    adapter = state.change.adapter(
        rank_class.ranks(state.change.shapes),
        factoring.alpha,
        rslora=factoring.rslora,
        singular_values=factoring.singular_values,
        seed=factoring.seed,
    )
    rows = {name: state.extra.get(f"rows/{rank_class.name}/{name}") for name in adapter}
    return Adapter(
        {
            name: factors if (last := rows[name]) is None else turn_towards(factors, last)
            for name, factors in adapter.items()
        }
    )


def turn_towards(factors: LoRAFactors, rows: torch.Tensor) -> LoRAFactors:
    """The same product with ``lora_A`` turned as near to ``rows [rank, in]`` as a rotation can."""
    U, _, Vh = torch.linalg.svd(rows.double() @ factors.lora_A.double().T)
    rotation = U @ Vh
    lora_A = (rotation @ factors.lora_A.double()).to(factors.lora_A.dtype)
    lora_B = (factors.lora_B.double() @ rotation.T).to(factors.lora_B.dtype)
    return replace(factors, lora_A=lora_A, lora_B=lora_B)


def remember_rows(state: State, sent: Mapping[str, Start]) -> State:
    """Keep the ``lora_A`` that every class was sent, for ``turn_towards`` in the next round."""
    extra = dict(state.extra)
    for rank_class, start in of_this_round(state, sent).items():
        for name, factors in start.trained.items():
            extra[f"rows/{rank_class}/{name}"] = factors.lora_A
    return replace(state, extra=extra)


def of_this_round(state: State, sent: Mapping[str, Start]) -> dict[str, Start]:
    """Without the starts of earlier rounds, whose updates came late."""
    return {name: start for name, start in sent.items() if start.base_round == state.round}


class StartedFrom:
    """What the clients of a round started from, weighted as they are: one term per class."""

    def __init__(self, sent: Mapping[str, Start]) -> None:
        self._sent, self._weights, self._total = dict(sent), dict.fromkeys(sent, 0), 0

    def admit(self, update: Update) -> None:
        """Raises ``UpdateRefused`` for a start that this round did not send."""
        start = self._sent.get(update.rank_class)
        if self._sent and (start is None or start.digest != update.digest):
            raise UpdateRefused(
                f"client {update.client_id}: the update names start "
                f"'{update.rank_class}/{update.digest[:12]}', which this round did not send; "
                "what it started from cannot be subtracted."
            )

    def add(self, update: Update) -> None:
        self._total += update.num_examples
        if update.rank_class in self._weights:
            self._weights[update.rank_class] += update.num_examples

    def terms(self, module: str, weight: float) -> tuple[Term, ...]:
        """``weight * sum_k p_k start_k`` of one module."""
        return tuple(
            factors_term(weight * count / self._total, self._sent[name].trained[module])
            for name, count in sorted(self._weights.items())
            if count
        )
