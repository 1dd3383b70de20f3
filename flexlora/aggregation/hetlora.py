"""HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432): norm weights and self-pruning.

    w_k = |s_k B_k A_k|_F / sum_j |s_j B_j A_j|_F        over all modules of client k together
    A <- sum_k w_k pad(A_k),    B <- sum_k w_k pad(s_k B_k)

A client of rank r is sent the first r rows and columns. It adds ``penalty * |B_tail|_F |A_tail|_F``
to its loss, over the terms from ``factor * rank`` on, and drops these terms when that product of
norms has shrunk in training; it then stays at its lower rank. The number of examples plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import Field

from flexlora.aggregation.engine.factor_sums import FactorSums, factor_start, factor_state
from flexlora.aggregation.engine.method import Factoring, Law, LocalPlan, Start, State, Update
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.options import MethodOptions
from flexlora.algebra.linalg import product_norm
from flexlora.lora.ranks import RankClass

__all__ = ["HetLoRA"]


class HetLoRA:
    """Sparsity-weighted averaging of zero-padded factors; ranks that clients lower themselves."""

    name = "hetlora"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ONE_CLIENT})

    class Options(MethodOptions):
        prune_factor: float = Field(
            default=0.75,
            ge=0.0,
            le=0.999,
            description="share kept by pruning (0: none)",
        )
        prune_penalty: float = Field(default=1e-3, ge=0.0, description="weight of the tail's norm")

    def __init__(self, options: Options) -> None:
        self.options = options
        self.local = LocalPlan(
            prune_factor=options.prune_factor, prune_penalty=options.prune_penalty
        )

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return factor_start(state, rank_class, factoring, local=self.local)

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> OpenRound:
        sums = FactorSums(state.change.shapes)

        def fold(update: Update) -> None:
            norms = (f.scaling * product_norm(f.lora_B, f.lora_A) for f in update.adapter.values())
            sums.add(update.adapter, math.sqrt(sum(norm**2 for norm in norms)))

        def close() -> State:
            if sums.total == 0.0:  # nobody changed anything: all products are zero
                return state.one_round_later()
            return factor_state(state, {name: sums.mean(name) for name in state.change})

        return OpenRound(state, sent, clients, fold=fold, close=close)
