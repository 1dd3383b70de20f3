"""HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432): norm weights and self-pruning.

    w_k = d_k |s_k B_k A_k|_F / sum_j d_j |s_j B_j A_j|_F     over all modules of client k together
    A <- sum_k w_k pad(A_k),    B <- sum_k w_k pad(s_k B_k)

A client of rank r is sent the first r rows and columns. It adds ``penalty * |B_tail|_F |A_tail|_F``
to its loss, over the terms from ``factor * rank`` on, and drops these terms when that product of
norms has shrunk in training; it then stays at its lower rank. The number of examples plays no part;
``d_k`` is the discount of a late update (1 for others), which the engine applies.
"""

from __future__ import annotations

import math

from flexlora.aggregation.engine.held_factors import first_rows, hold
from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import MethodOptions, option
from flexlora.aggregation.engine.starts import Factoring, LocalPlan, Start
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.aggregation.engine.updates import Update
from flexlora.algebra.linalg import product_norm
from flexlora.lora.ranks import RankClass

__all__ = ["HetLoRA"]


def norm_of_products(update: Update) -> float:
    """``|s_k B_k A_k|_F`` over all modules together."""
    norms = (f.scaling * product_norm(f.lora_B, f.lora_A) for f in update.adapter.values())
    return math.sqrt(sum(norm**2 for norm in norms))


class HetLoRA:
    """Sparsity-weighted averaging of zero-padded factors; ranks that clients lower themselves."""

    name = "hetlora"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ONE_CLIENT})
    needs = Needs(factors=True, weight=norm_of_products)
    wire_space = ""

    class Options(MethodOptions):
        prune_factor: float = option(0.75, "share kept by pruning (0: none)", ge=0.0, le=0.999)
        prune_penalty: float = option(1e-3, "weight of the tail's norm", ge=0.0)

    def __init__(self, options: Options) -> None:
        self.options = options
        self.local = LocalPlan(
            prune_factor=options.prune_factor, prune_penalty=options.prune_penalty
        )

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        trained = first_rows(state, rank_class.ranks(state.change.shapes), factoring)
        return Start(
            rank_class=rank_class, base_round=state.round, trained=trained, local=self.local
        )

    def close(self, state: State, sums: Sums) -> State:
        if sums.factors.total == 0.0:  # all products, and so all weights, are zero
            return state.unchanged()
        return hold(state, {name: sums.factors.mean(name) for name in state.change})
