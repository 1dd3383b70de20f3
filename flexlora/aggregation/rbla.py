"""RBLA (arXiv 2408.08699): every rank row is averaged over the clients that have it.

    A[j] <- sum_{k: r_k > j} n_k A_k[j] / sum_{k: r_k > j} n_k,   and so B[:, j] with s_k B_k

Zero-padding would shrink the rows that only strong clients have. A row that nobody of this round
has stays as it was, which the paper, whose clients all take part, need not say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from flexlora.aggregation.engine.factor_gap import rows_of
from flexlora.aggregation.engine.factor_sums import (
    FactorSums,
    factor_start,
    factor_state,
    known_factors,
    widened,
)
from flexlora.aggregation.engine.method import Factoring, Law, Start, State, Update
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.options import MethodOptions
from flexlora.lora.ranks import RankClass

__all__ = ["RBLA", "begin_holders"]


class RBLA:
    """Rank-based averaging: contributors only."""

    name = "rbla"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING})

    Options = MethodOptions

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return factor_start(state, rank_class, factoring)

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> OpenRound:
        return begin_holders(state, sent, clients)


def begin_holders(
    state: State,
    sent: Mapping[str, Start],
    clients: Mapping[str, str] | None,
    admit: Callable[[Update], None] | None = None,
) -> OpenRound:
    """A round that averages every row over those who have it."""
    sums = FactorSums(state.change.shapes)

    def fold(update: Update) -> None:
        sums.add(update.adapter, update.num_examples, rows_of(update, sent))

    def close() -> State:
        held = {name: _kept_where_nobody_is(state, sent, name, sums) for name in state.change}
        return factor_state(state, held)

    return OpenRound(state, sent, clients, fold=fold, close=close, admit=admit)


def _kept_where_nobody_is(
    state: State, sent: Mapping[str, Start], name: str, sums: FactorSums
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over holders of each row; rows without a holder as they were before the round.

    Before the first round that is as they were sent: zeros in both factors would never train.
    """
    A, B, has = sums.mean_of_holders(name)
    last = known_factors(state, sent, name)
    if last is None:
        return A, B
    rank = max(A.shape[0], last[0].shape[0])
    A, B = widened((A, B), rank)
    last_A, last_B = widened(last, rank)
    has = torch.nn.functional.pad(has, (0, rank - has.shape[0]))
    return torch.where(has[:, None], A, last_A), torch.where(has, B, last_B)
