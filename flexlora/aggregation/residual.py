"""The residual form of FlexLoRA: the server averages only what training changed.

    client k:  starts from T_{r_k}(G), trains, sends its factors back whole
    server:    G <- G + eta * sum_k p_k (s_k B_k A_k - start_k)

``start_k`` is the product that client k decoded: ``T_{r_k}(G)`` over a lossless wire, rounded over
a 16-bit one. A round without training changes nothing, so there is no rank collapse (arXiv
2602.13486) by construction.
"""

from __future__ import annotations

from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import AdaptiveStepOptions
from flexlora.aggregation.engine.server_step import moved_by
from flexlora.aggregation.engine.starts import Factoring, Start, truncated
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.lora.ranks import RankClass

__all__ = ["Residual"]


class Residual:
    """Adds the weighted changes that training made to ``G``, with a server learning rate."""

    name = "residual"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS})
    needs = Needs(products=True, starts=True, norms=True)
    wire_space = "products"

    Options = AdaptiveStepOptions

    def __init__(self, options: AdaptiveStepOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        trained = truncated(state, rank_class, factoring)
        return Start(rank_class=rank_class, base_round=state.round, trained=trained)

    def close(self, state: State, sums: Sums) -> State:
        return moved_by(state, sums.products - sums.starts, self.options, norms=sums.norms)
