"""The residual form with one start for all ranks: train ``T_r(G)``, carry the rest of ``G``.

    client k:  T_{r_k}(G) trained, T_c(G) - T_{r_k}(G) frozen beside it
    server:    G <- T_max(G + eta * sum_k p_k (s_k B_k A_k - T_{r_k}(G)))

FlexLoRA starts clients of different rank from different models and adds up their changes as if they
had started from the same one. Frozen factors need no gradient and no optimizer state, so every
client can carry ``G`` up to a rank c far above the rank that it trains, and all start from
``T_c(G)``. The server's step is that of the residual form.
"""

from __future__ import annotations

from typing import Literal

from flexlora.aggregation.engine.options import CARRIED_RANK, AdaptiveStepOptions, option
from flexlora.aggregation.engine.server_step import moved_by
from flexlora.aggregation.engine.starts import Factoring, Start, directions, truncated
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.aggregation.residual import Residual
from flexlora.lora.ranks import RankClass

__all__ = ["Carried"]


class Carried:
    """The residual form; directions r to c of ``G`` are carried frozen."""

    name = "carried"
    laws = Residual.laws
    needs = Needs(products=True, starts=True, norms=True)
    wire_space = "products"

    class Options(AdaptiveStepOptions):
        carried_rank: int = option(
            CARRIED_RANK, "rank up to which G is sent, where a class names no other", ge=1
        )
        carried_dtype: Literal["", "float32", "bfloat16"] = option(
            "", "dtype of the frozen factors (empty: wire.dtype)"
        )

    def __init__(self, options: Options) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        ranks = rank_class.ranks(state.change.shapes)
        last = rank_class.carried_rank or self.options.carried_rank
        return Start(
            rank_class=rank_class,
            base_round=state.round,
            trained=truncated(state, rank_class, factoring),
            carried=directions(state, ranks, last, factoring),
            carried_dtype=self.options.carried_dtype,
        )

    def close(self, state: State, sums: Sums) -> State:
        return moved_by(state, sums.products - sums.starts, self.options, norms=sums.norms)
