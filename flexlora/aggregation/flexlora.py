"""FlexLoRA as published (Bai et al., NeurIPS 2024, arXiv 2402.11505, equations 2 and 3).

    client k:  starts from T_{r_k}(G), trains, sends its factors back whole
    server:    G <- sum_k p_k s_k B_k A_k

The known defect (rank collapse, arXiv 2602.13486): direction j is shrunk in every round, even
without any training, to the weight share of the clients of rank >= j.

With error feedback (ECLoRA, TNNLS 2025) each client's truncation error ``G - T_{r_k}(G)`` is added
to its product; the rule is then that of the residual form.
"""

from __future__ import annotations

from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import StepOptions
from flexlora.aggregation.engine.server_step import moved_by, moved_to
from flexlora.aggregation.engine.starts import Factoring, Start, truncated
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.lora.ranks import RankClass

__all__ = ["FlexLoRA"]


class FlexLoRA:
    """The weighted average of the products, and ``T_r`` of it for every rank class."""

    name = "flexlora"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ONE_CLIENT, Law.AVERAGE_OF_PRODUCTS})
    needs = Needs(products=True)
    wire_space = ""

    Options = StepOptions

    def __init__(self, options: StepOptions) -> None:
        self.options = options
        if options.error_feedback:
            self.laws = self.laws - {Law.ONE_CLIENT} | {Law.ZERO_TRAINING}
            self.needs, self.wire_space = Needs(products=True, starts=True), "products"

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        trained = truncated(state, rank_class, factoring)
        return Start(rank_class=rank_class, base_round=state.round, trained=trained)

    def close(self, state: State, sums: Sums) -> State:
        if self.options.error_feedback:
            return moved_by(state, sums.products - sums.starts, self.options)
        return moved_to(state, sums.products, self.options)
