"""SLoRA (Babakniya et al., 2023, arXiv 2308.06522): sparse rounds, then an SVD start for LoRA.

    rounds 1 to t:  W <- W + sum_k p_k Delta_k,  Delta_k nonzero in chosen columns of W only
    then:           B, A = the SVD of the change so far, cut at the ranks; then FedIT

The paper draws a random mask of entries. Here a mask is of whole columns of W (input features),
drawn in each round and nested across ranks: ``Delta = B @ A`` with one-hot rows in a frozen A, so
that r values per output are trained, sent and summed. The directions beyond the largest rank are
dropped, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from flexlora.aggregation.engine.held_factors import held_factors, hold
from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import UNCAPPED, MethodOptions, StepOptions, option
from flexlora.aggregation.engine.server_step import moved_by
from flexlora.aggregation.engine.starts import Factoring, LocalPlan, Start, whole_change
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.aggregation.fedit import FedIT
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.ranks import RankClass
from flexlora.seeds import generator

__all__ = ["SLoRA"]


class SLoRA:
    """``sparse_rounds`` rounds in random columns, then FedIT from the SVD of their sum."""

    name = "slora"
    # Zero training changes nothing in the sparse rounds only.
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.AVERAGE_OF_PRODUCTS})
    needs = Needs(products=True, factors=True)
    wire_space = ""

    class Options(MethodOptions):
        sparse_rounds: int = option(2, "rounds before the SVD start", ge=0)

    def __init__(self, options: Options) -> None:
        self.options = options
        if options.sparse_rounds == 0:
            self.laws = FedIT.laws

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        if state.round >= self.options.sparse_rounds:
            if held_factors(state, next(iter(state.change))) is None:
                # The last sparse round had no update, so ``close`` was not called.
                state = _svd_start(state, dict.fromkeys(state.change, UNCAPPED))
            return FedIT(self.options).start(state, rank_class, factoring)
        return Start(
            rank_class=rank_class,
            base_round=state.round,
            trained=_chosen_columns(state, rank_class, factoring),
            carried=whole_change(state, factoring),
            trainable=("lora_B",),
            local=LocalPlan(merge=True),
        )

    def close(self, state: State, sums: Sums) -> State:
        rounds = self.options.sparse_rounds
        if state.round >= rounds:
            return FedIT(self.options).close(state, sums)
        summed = moved_by(state, sums.products, StepOptions(server_max_rank=UNCAPPED))
        if summed.round < rounds:
            return summed
        widest = {
            name: max((start.trained[name].rank for start in sums.sent.values()), default=UNCAPPED)
            for name in state.change
        }
        return _svd_start(summed, widest)


def _chosen_columns(state: State, rank_class: RankClass, factoring: Factoring) -> Adapter:
    """One-hot rows in ``lora_A`` for the columns of this round, zeros in ``lora_B``, scaling 1."""
    modules = {}
    for name, rank in rank_class.ranks(state.change.shapes).items():
        svd = state.change[name]
        out_features, in_features = svd.shape
        draws = generator(factoring.seed, "columns", state.round, name)
        columns = torch.randperm(in_features, generator=draws)[:rank]
        lora_A = svd.Vh.new_zeros(rank, in_features)
        lora_A[torch.arange(rank, device=lora_A.device), columns.to(lora_A.device)] = 1.0
        modules[name] = LoRAFactors(
            lora_A=lora_A, lora_B=svd.U.new_zeros(out_features, rank), alpha=float(rank)
        )
    return Adapter(modules)


def _svd_start(state: State, ranks: Mapping[str, int]) -> State:
    """``U S`` and ``Vh`` at the largest rank as the factors that FedIT starts from.

    The share of the energy that the cut drops is in ``dropped_energy``.
    """
    factors = {}
    for name, svd in state.change.items():
        top = svd.truncate(ranks[name])
        factors[name] = (top.Vh.double(), top.U.double() * top.S.double())
    if not any(A.shape[0] for A, _ in factors.values()):
        return state
    return replace(
        hold(state, factors),
        round=state.round,
        modules=state.modules,
        dropped_energy=1.0 - state.change.total_energy_kept(ranks),
    )
