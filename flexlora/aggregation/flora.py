"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): stack, merge into the base, begin afresh.

    A = [A_1; ...; A_K],  B = [p_1 s_1 B_1 ... p_K s_K B_K];   W <- W + B A;   new random factors

``[B] @ [A]`` is the exact weighted sum of the products. Nobody keeps state between rounds here, so
a client is sent the sum of all rounds so far, ``G``, in as few numbers as hold it, and merges it
into its weights; on a 4-bit base, whose weights cannot take it, it is carried beside them.
"""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.aggregation.aligned import begin_sum, carried_directions, fresh_factors
from flexlora.aggregation.engine.method import Factoring, Law, LocalPlan, Start, State
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.options import StepOptions
from flexlora.lora.ranks import RankClass

__all__ = ["FLoRA", "merged_start"]


class FLoRA:
    """The stack of all updates, merged."""

    name = "flora"
    laws = frozenset(
        {Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS},
    )

    Options = StepOptions

    def __init__(self, options: StepOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return merged_start(state, rank_class, factoring)

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> OpenRound:
        return begin_sum(state, sent, clients, self.options)


def merged_start(state: State, rank_class: RankClass, factoring: Factoring) -> Start:
    """Fresh random factors over the whole of ``G``, which the client merges where it can."""
    nothing = dict.fromkeys(state.change, 0)
    everything = max(svd.rank for svd in state.change.values())
    return Start(
        rank_class=rank_class,
        base_round=state.round,
        trained=fresh_factors(state, rank_class, factoring),
        carried=carried_directions(state, nothing, everything, factoring),
        local=LocalPlan(merge=True),
    )
