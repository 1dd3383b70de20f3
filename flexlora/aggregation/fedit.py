"""FedIT (Zhang et al., ICASSP 2024, arXiv 2305.05644), zero-padded where ranks differ.

    A <- sum_k p_k pad(A_k),    B <- sum_k p_k pad(s_k B_k)

The mean of the factors is not the mean of the products: their difference is the covariance of
``s_k B_k`` and ``A_k`` over the clients. It is here as the baseline that everybody knows.
"""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.aggregation.engine.factor_sums import FactorSums, factor_start, factor_state
from flexlora.aggregation.engine.method import Factoring, Law, Start, State, Update
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.options import MethodOptions
from flexlora.lora.ranks import RankClass

__all__ = ["FedIT"]


class FedIT:
    """Averages ``lora_A`` and ``lora_B`` apart; the state keeps both beside their product."""

    name = "fedit"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ONE_CLIENT})

    Options = MethodOptions

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return factor_start(state, rank_class, factoring)

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> OpenRound:
        sums = FactorSums(state.change.shapes)

        def fold(update: Update) -> None:
            sums.add(update.adapter, update.num_examples)

        def close() -> State:
            return factor_state(state, {name: sums.mean(name) for name in state.change})

        return OpenRound(state, sent, clients, fold=fold, close=close)
