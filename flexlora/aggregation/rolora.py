"""RoLoRA (Chen et al., NeurIPS 2025, arXiv 2502.01755): A and B in alternate rounds.

    odd rounds:   B <- B + sum_k p_k pad(s_k B_k - s_k B_start),   A as it is
    even rounds:  A <- A + sum_k p_k pad(A_k - A_start),           B as it is

One of the two factors is always shared, so the mean of the products is the product of the means,
and ``lora_A`` learns too, which FFA-LoRA gives up. ``lora_B`` goes first, since it begins at zero.
"""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.aggregation.engine.factor_sums import factor_start
from flexlora.aggregation.engine.method import Factoring, Law, Start, State
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.options import MethodOptions
from flexlora.aggregation.ffa_lora import begin_changes
from flexlora.lora.ranks import RankClass

__all__ = ["RoLoRA"]


class RoLoRA:
    """FFA-LoRA's exact averaging with the frozen factor changing from round to round."""

    name = "rolora"
    laws = frozenset(
        {Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS},
    )

    Options = MethodOptions

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        trainable = ("lora_A",) if state.round % 2 else ("lora_B",)
        return factor_start(state, rank_class, factoring, trainable=trainable)

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> OpenRound:
        return begin_changes(state, sent, clients)
