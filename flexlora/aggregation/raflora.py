"""raFLoRA (arXiv 2602.13486): bands of rank, each weighted over the clients that reach it.

    M = sum_j sum_{k: r_k > j} (n_k / N_j) s_k B_k[:, j] A_k[j],    N_j = sum_{k: r_k > j} n_k

FlexLoRA's average scales direction j by the weight of the clients of rank > j, so the tail
collapses; here the weights of every band add up to one. A band that no client of the round reaches
is lost, unless error feedback adds back the change of ``G`` that the rule makes without training.
"""

from __future__ import annotations

from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import StepOptions
from flexlora.aggregation.engine.server_step import moved_by, moved_to
from flexlora.aggregation.engine.starts import Factoring, Start, truncated
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.lora.ranks import RankClass

__all__ = ["RaFLoRA"]


class RaFLoRA:
    """Rank-partitioned averaging of the products, and ``T_r`` of it for every rank class."""

    name = "raflora"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ONE_CLIENT})
    needs = Needs(bands=True)
    wire_space = ""

    Options = StepOptions

    def __init__(self, options: StepOptions) -> None:
        self.options = options
        if options.error_feedback:
            self.laws = self.laws - {Law.ONE_CLIENT} | {Law.ZERO_TRAINING}
            self.needs = Needs(band_changes=True)

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        trained = truncated(state, rank_class, factoring)
        return Start(rank_class=rank_class, base_round=state.round, trained=trained)

    def close(self, state: State, sums: Sums) -> State:
        if self.options.error_feedback:
            return moved_by(state, sums.band_changes, self.options)
        return moved_to(state, sums.bands, self.options)
