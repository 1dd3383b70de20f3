"""FedIT (Zhang et al., ICASSP 2024, arXiv 2305.05644), zero-padded where ranks differ.

    A <- sum_k p_k pad(A_k),    B <- sum_k p_k pad(s_k B_k)

The mean of the factors is not the mean of the products: their difference is the covariance of
``s_k B_k`` and ``A_k`` over the clients. It is the standard baseline.
"""

from __future__ import annotations

from flexlora.aggregation.engine.held_factors import first_rows, hold
from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import MethodOptions
from flexlora.aggregation.engine.starts import Factoring, Start
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.lora.ranks import RankClass

__all__ = ["FedIT"]


class FedIT:
    """Averages ``lora_A`` and ``lora_B`` separately; the state has both and their product."""

    name = "fedit"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ONE_CLIENT})
    needs = Needs(factors=True)
    wire_space = ""

    Options = MethodOptions

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        trained = first_rows(state, rank_class.ranks(state.change.shapes), factoring)
        return Start(rank_class=rank_class, base_round=state.round, trained=trained)

    def close(self, state: State, sums: Sums) -> State:
        return hold(state, {name: sums.factors.mean(name) for name in state.change})
