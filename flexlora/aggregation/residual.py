"""The residual form of FlexLoRA: only what training changed is averaged (DESIGN.md, section 1).

    G <- G + eta * sum_k p_k (s_k B_k A_k - start_k)

``start_k`` is the decoded product that client k really started from: ``T_{r_k}(G)`` over a lossless
wire, its rounded neighbour over a 16-bit one. Nobody trains, nothing changes: no rank collapse
(arXiv 2602.13486) by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flexlora.aggregation.engine.method import Factoring, Law, Start, State
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.options import FastStepOptions
from flexlora.aggregation.engine.product_sums import ProductSums
from flexlora.aggregation.engine.server_step import next_state
from flexlora.aggregation.engine.truncated import StartedFrom, truncated_start
from flexlora.algebra.decompose import LazySums, MatrixSum
from flexlora.lora.ranks import RankClass

__all__ = ["Residual"]


class Residual:
    """Adds the weighted changes that training made to ``G``, with a server learning rate."""

    name = "residual"
    laws = frozenset(
        {Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS},
    )

    Options = FastStepOptions

    def __init__(self, options: FastStepOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return truncated_start(state, rank_class, factoring)

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> OpenRound:
        products, started = ProductSums(state.change.shapes), StartedFrom(sent)

        def close() -> State:
            def change(name: str) -> MatrixSum:
                total = products.mean(name)
                return replace(total, terms=total.terms + started.terms(name, -1.0))

            return next_state(state, LazySums(state.change, change), self.options)

        return OpenRound(
            state,
            sent,
            clients,
            products=products,
            fold=started.add,
            close=close,
            admit=started.admit,
        )
