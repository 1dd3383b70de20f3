"""FlexLoRA as published (Bai et al., NeurIPS 2024, arXiv 2402.11505, equations 2 and 3).

    G <- sum_k p_k s_k B_k A_k

A client of rank r starts from ``T_r(G)`` and sends its factors back whole. The known defect (rank
collapse, arXiv 2602.13486): a direction j that only clients of rank >= j hold keeps only their
share of the weight each round, even when nobody trains.

With error feedback (ECLoRA, TNNLS 2025) what truncation to its rank took from each client,
``G - T_{r_k}(G)``, is added to its product; the rule is then that of the residual form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flexlora.aggregation.engine.method import Factoring, Law, Start, State
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.options import StepOptions
from flexlora.aggregation.engine.product_sums import ProductSums
from flexlora.aggregation.engine.server_step import next_state
from flexlora.aggregation.engine.truncated import StartedFrom, truncated_start
from flexlora.algebra.decompose import LazySums, MatrixSum
from flexlora.lora.ranks import RankClass

__all__ = ["FlexLoRA"]


class FlexLoRA:
    """The weighted average of the products, and ``T_r`` of it for every rank class."""

    name = "flexlora"
    laws = frozenset(
        {Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ONE_CLIENT, Law.AVERAGE_OF_PRODUCTS},
    )

    Options = StepOptions

    def __init__(self, options: StepOptions) -> None:
        self.options = options
        if options.error_feedback:
            self.laws = self.laws - {Law.ONE_CLIENT} | {Law.ZERO_TRAINING}

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return truncated_start(state, rank_class, factoring)

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> OpenRound:
        products, started = ProductSums(state.change.shapes), StartedFrom(sent)

        def close() -> State:
            feedback = self.options.error_feedback

            def total(name: str) -> MatrixSum:
                mean = products.mean(name)
                sent_away = started.terms(name, -1.0) if feedback else ()
                return replace(mean, terms=mean.terms + sent_away)

            sums = LazySums(state.change, total)
            return next_state(state, sums, self.options, target=not feedback)

        return OpenRound(
            state,
            sent,
            clients,
            products=products,
            fold=started.add,
            close=close,
            admit=started.admit if self.options.error_feedback else None,
        )
