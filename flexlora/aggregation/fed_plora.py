"""Fed-PLoRA (ICLR 2026, arXiv 2602.16936): each client trains a random subset of rank-one terms.

    Delta W = sum_{j < R} b_j a_j;   client k trains a random set J_k of r_k terms and folds the
    others into its frozen weights;   a_j, b_j <- their means over the clients that trained term j

All clients start from the same model, whatever their rank, at the price of receiving all R terms.
The sets are drawn from (seed, round, client). A term that no client drew is unchanged.
"""

from __future__ import annotations

from flexlora.aggregation.engine.held_factors import first_rows, held_factors, hold
from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import CARRIED_RANK, MethodOptions, option
from flexlora.aggregation.engine.starts import Factoring, LocalPlan, Start
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.aggregation.rbla import mean_of_holders
from flexlora.lora.ranks import RankClass

__all__ = ["FedPLoRA"]


class FedPLoRA:
    """``carried_rank`` rank-one terms, each averaged over the clients that trained it."""

    name = "fed-plora"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING})
    needs = Needs(factors=True, starts=True)
    wire_space = ""

    class Options(MethodOptions):
        carried_rank: int = option(CARRIED_RANK, "terms of rank one that all are sent", ge=1)

    def __init__(self, options: Options) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        shapes = state.change.shapes
        terms = {name: self._terms(state, name) for name in shapes}
        ranks = {n: max(rank, terms[n]) for n, rank in rank_class.ranks(shapes).items()}
        return Start(
            rank_class=rank_class,
            base_round=state.round,
            trained=first_rows(state, ranks, factoring),
            local=LocalPlan(select=True, select_seed=factoring.seed),
        )

    def _terms(self, state: State, name: str) -> int:
        """Number of terms: ``carried_rank``, or more if a rank class above it has added some."""
        factors = held_factors(state, name)
        known = 0 if factors is None else factors[0].shape[0]
        return max(known, min(self.options.carried_rank, *state.change[name].shape))

    def close(self, state: State, sums: Sums) -> State:
        return hold(state, {name: mean_of_holders(state, sums, name) for name in state.change})
