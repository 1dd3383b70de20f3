"""RBLA (arXiv 2408.08699): each row of rank is averaged over the clients that train it.

    A[j] <- sum_{k: r_k > j} n_k A_k[j] / sum_{k: r_k > j} n_k,   and so B[:, j] with s_k B_k

Zero-padding would shrink the rows that only high-rank clients train. A row that no client of a
round trains is unchanged (in the paper all clients take part in every round).
"""

from __future__ import annotations

import torch

from flexlora.aggregation.engine.factor_sums import Pair
from flexlora.aggregation.engine.held_factors import hold, known_factors, widened
from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import MethodOptions
from flexlora.aggregation.engine.starts import Factoring, Start
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.aggregation.fedit import FedIT
from flexlora.lora.ranks import RankClass

__all__ = ["RBLA", "mean_of_holders"]


class RBLA:
    """Averages each row over its contributors only."""

    name = "rbla"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING})
    needs = Needs(factors=True)
    wire_space = ""

    Options = MethodOptions

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return FedIT(self.options).start(state, rank_class, factoring)

    def close(self, state: State, sums: Sums) -> State:
        return hold(state, {name: mean_of_holders(state, sums, name) for name in state.change})


def mean_of_holders(state: State, sums: Sums, name: str) -> Pair:
    """The mean of each row over the clients that train it; other rows have their last value.

    In the first round that is the value that was sent: zeros in both factors would never train.
    """
    A, B, has = sums.factors.mean_of_holders(name)
    last = known_factors(state, sums.sent, name)
    if last is None:
        return A, B
    rank = max(A.shape[0], last[0].shape[0])
    A, B = widened((A, B), rank)
    last_A, last_B = widened(last, rank)
    has = torch.nn.functional.pad(has, (0, rank - has.shape[0]))
    return torch.where(has[:, None], A, last_A), torch.where(has, B, last_B)
