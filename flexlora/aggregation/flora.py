"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): stack, merge, restart.

    A = [A_1; ...; A_K],  B = [p_1 s_1 B_1 ... p_K s_K B_K];   W <- W + B A;   new random factors

``[B] @ [A]`` is the exact weighted sum of the products. Clients are stateless, so
each is sent the sum of all rounds so far, ``G``, as low-rank factors and merges it into its
weights; over a quantized base it is carried as separate factors.
"""

from __future__ import annotations

from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import StepOptions
from flexlora.aggregation.engine.server_step import moved_by
from flexlora.aggregation.engine.starts import Factoring, LocalPlan, Start, fresh, whole_change
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.lora.ranks import RankClass

__all__ = ["FLoRA"]


class FLoRA:
    """Adds the stack of all updates to ``G``."""

    name = "flora"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS})
    needs = Needs(products=True)
    wire_space = "products"

    Options = StepOptions

    def __init__(self, options: StepOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return Start(
            rank_class=rank_class,
            base_round=state.round,
            trained=fresh(state, rank_class, factoring),
            carried=whole_change(state, factoring),
            local=LocalPlan(merge=True),
        )

    def close(self, state: State, sums: Sums) -> State:
        return moved_by(state, sums.products, self.options)
