"""Clients that start from ``T_r(G)``: the start itself, and the sum of what they started from."""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.aggregation.engine.method import State, Update
from flexlora.aggregation.engine.product_sums import factors_term
from flexlora.aggregation.engine.starts import Factoring, Start
from flexlora.algebra.decompose import Term
from flexlora.errors import UpdateRefused
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass

__all__ = [
    "StartedFrom",
    "truncated_adapter",
    "truncated_start",
]


def truncated_start(state: State, rank_class: RankClass, factoring: Factoring) -> Start:
    """``T_r(G)`` to train from, nothing carried: what the published method sends."""
    trained = truncated_adapter(state, rank_class, factoring)
    return Start(rank_class=rank_class, base_round=state.round, trained=trained)


def truncated_adapter(state: State, rank_class: RankClass, factoring: Factoring) -> Adapter:
    """``T_r(G)`` as factors."""
    return state.change.adapter(
        rank_class.ranks(state.change.shapes),
        factoring.alpha,
        rslora=factoring.rslora,
        seed=factoring.seed,
    )


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
