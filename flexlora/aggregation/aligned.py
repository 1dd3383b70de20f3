"""Carry ``G`` at a high rank, train at a low one along the top directions of the local gradient.

    client k:  T_c(G) frozen; lora_A = top r right singular vectors of dL_k/dW, lora_B = 0; train
    server:    G <- T_max(G + eta * sum_k p_k s_k B_k A_k)

FlexLoRA sends a client ``G`` at the rank that it trains, so a low-rank client starts from a worse
model. Frozen factors need no gradient and no optimizer state, so every client can carry ``T_c(G)``
at a rank c far above the r that it trains. The method is new in this project; starting ``lora_A``
in the gradient's row space is the idea of GaLore (arXiv 2403.03507) and LoRA-GA (arXiv 2407.05000),
here per client and round, from a sketch (``algebra/sketch.py``).
"""

from __future__ import annotations

from typing import Literal

from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import CARRIED_RANK, AdaptiveStepOptions, option
from flexlora.aggregation.engine.server_step import moved_by
from flexlora.aggregation.engine.starts import Factoring, LocalPlan, Start, directions, fresh
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.lora.ranks import RankClass

__all__ = ["Aligned"]


class Aligned:
    """All clients carry ``T_c(G)``; fresh factors are trained and their mean product is added."""

    name = "aligned"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS})
    needs = Needs(products=True, norms=True)
    wire_space = "products"

    class Options(AdaptiveStepOptions):
        carried_rank: int = option(
            CARRIED_RANK, "rank of the frozen factors, where a class names no other", ge=1
        )
        carried_dtype: Literal["", "float32", "bfloat16"] = option(
            "", "dtype of the frozen factors (empty: wire.dtype)"
        )
        gradient_batches: int = option(1, "batches to align lora_A with (0: random rows)", ge=0)

    def __init__(self, options: Options) -> None:
        self.options = options
        self.local = LocalPlan(gradient_batches=options.gradient_batches)

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        last = rank_class.carried_rank or self.options.carried_rank
        return Start(
            rank_class=rank_class,
            base_round=state.round,
            trained=fresh(state, rank_class, factoring),
            carried=directions(state, dict.fromkeys(state.change, 0), last, factoring),
            carried_dtype=self.options.carried_dtype,
            local=self.local,
        )

    def close(self, state: State, sums: Sums) -> State:
        return moved_by(state, sums.products, self.options, norms=sums.norms)
