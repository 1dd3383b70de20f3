"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): ``lora_A`` frozen and shared.

    A fixed, nested across ranks;    B <- B + sum_k p_k pad(s_k B_k - s_k B_start)

With A shared the mean of the products is the product of the means, so nothing is lost in averaging;
only ``lora_B`` is trained and sent back. At equal ranks this is the paper's mean of B. Where ranks
differ the mean is of the changes, so that a column that few clients have does not shrink.
"""

from __future__ import annotations

from flexlora.aggregation.engine.held_factors import add_columns, first_rows
from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import MethodOptions
from flexlora.aggregation.engine.starts import Factoring, Start
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.lora.ranks import RankClass

__all__ = ["FFALoRA"]


class FFALoRA:
    """Trains and averages ``lora_B`` alone."""

    name = "ffa-lora"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS})
    needs = Needs(linear=True)
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
            trainable=("lora_B",),
        )

    def close(self, state: State, sums: Sums) -> State:
        return add_columns(state, sums)
