"""RoLoRA (Chen et al., NeurIPS 2025, arXiv 2502.01755): A and B in alternate rounds.

    odd rounds:   B <- B + sum_k p_k pad(s_k B_k - s_k B_start),   A as it is
    even rounds:  A <- A + sum_k p_k pad(A_k - A_start),           B as it is

One of the two factors is always shared, so the mean of the products is the product of the means,
and ``lora_A`` learns too, which FFA-LoRA gives up. ``lora_B`` goes first, since it begins at zero.
"""

from __future__ import annotations

from flexlora.aggregation.engine.held_factors import add_changes, first_rows
from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import MethodOptions
from flexlora.aggregation.engine.starts import Factoring, Start
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.lora.ranks import RankClass

__all__ = ["RoLoRA"]


class RoLoRA:
    """FFA-LoRA's exact averaging with the frozen factor changing from round to round."""

    name = "rolora"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS})
    needs = Needs(factor_changes=True)
    wire_space = "factors"

    Options = MethodOptions

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        trained = first_rows(state, rank_class.ranks(state.change.shapes), factoring)
        return Start(
            rank_class=rank_class,
            base_round=state.round,
            trained=trained,
            trainable=("lora_A",) if state.round % 2 else ("lora_B",),
        )

    def close(self, state: State, sums: Sums) -> State:
        return add_changes(state, sums)
