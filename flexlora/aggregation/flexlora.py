"""FlexLoRA as published (Bai et al., NeurIPS 2024, arXiv 2402.11505, equations 2 and 3).

    G <- sum_k p_k s_k B_k A_k

A client of rank r starts from ``T_r(G)`` and sends its factors back whole. The known defect (rank
collapse, arXiv 2602.13486): a direction j that only clients of rank >= j hold keeps only their
share of the weight each round, even when nobody trains.
"""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.aggregation.base import Factoring, Law, Start, State, Update
from flexlora.aggregation.products import UpdateBuffer, next_state, product_terms
from flexlora.ranks import RankClass

__all__ = ["FlexLoRA"]


class FlexLoRA:
    """The weighted average of the products, and ``T_r`` of it for every rank class."""

    name = "flexlora"
    laws = frozenset(
        {Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ONE_CLIENT, Law.AVERAGE_OF_PRODUCTS},
    )

    def __init__(self, *, max_rank: int = 1 << 30) -> None:
        self.max_rank = max_rank

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return truncated_start(state, rank_class, factoring)

    def begin(self, state: State, sent: Mapping[str, Start]) -> None:
        self._state, self._buffer = state, UpdateBuffer()

    def add(self, update: Update) -> None:
        self._buffer.add(update)

    def finish(self) -> State:
        if not len(self._buffer):
            return self._state.one_round_later()
        weighted = self._buffer.weighted()
        terms = {name: product_terms(weighted, name) for name in self._state.change}
        return next_state(self._state, terms, max_rank=self.max_rank)


def truncated_start(state: State, rank_class: RankClass, factoring: Factoring) -> Start:
    """``T_r(G)`` to train from, nothing carried: what the published method sends."""
    ranks = rank_class.ranks(state.change.shapes)
    return Start(
        rank_class=rank_class,
        base_round=state.round,
        trained=state.change.adapter(
            ranks,
            factoring.alpha,
            rslora=factoring.rslora,
            singular_values=factoring.singular_values,
            seed=factoring.seed,
        ),
    )
