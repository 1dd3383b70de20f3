"""FLoRIST (MLSys 2026, arXiv 2506.09199): one compact adapter by a threshold on the energy.

    M = sum_k p_k s_k B_k A_k = U S V^T;   p = min {p : sum_{i<=p} S_i^2 >= tau |M|_F^2}
    W <- W + eta U_p S_p V_p^T;   new random factors

FLoRA's round with the sum of each round cut, module by module, to the fewest directions that hold
``tau`` of its energy; what the cut drops is reported by module as ``cut_energy``. With error
feedback it is added to the next round's sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field

from flexlora.aggregation.engine.method import Factoring, Law, Start, State
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.options import UNCAPPED, StepOptions
from flexlora.aggregation.engine.product_sums import ProductSums, svd_term
from flexlora.aggregation.engine.server_step import (
    dropped_share,
    next_state,
    pack_svd,
    tail_of,
    unpack_svd,
)
from flexlora.aggregation.flora import merged_start
from flexlora.algebra.decompose import LazySums, MatrixSum, decompose
from flexlora.lora.ranks import RankClass

__all__ = ["FLoRIST", "rank_for_energy"]


class FLoRIST:
    """Stacked updates, thresholded per round, merged."""

    name = "florist"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING})

    class Options(StepOptions):
        energy_threshold: float = Field(
            default=0.95,
            ge=1e-6,
            le=1.0,
            description="energy of a round that the cut keeps",
        )

    def __init__(self, options: Options) -> None:
        self.options = options
        if options.error_feedback:  # what an earlier cut dropped comes without any training
            self.laws = self.laws - {Law.ZERO_TRAINING}

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return merged_start(state, rank_class, factoring)

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> OpenRound:
        products = ProductSums(state.change.shapes)

        def close() -> State:
            extra, changes, notes = dict(state.extra), {}, {}
            sums = LazySums(state.change, products.mean)
            if self.options.error_feedback:
                means = sums
                sums = LazySums(means, lambda name: _with_last_cut(state, name, means[name]))
            dtype = next(iter(state.change.values())).U.dtype
            for name, found in decompose(sums, max_rank=UNCAPPED, dtype=dtype).items():
                rank = rank_for_energy(found.svd.S, self.options.energy_threshold)
                changes[name] = MatrixSum(
                    shape=found.svd.shape, terms=(svd_term(1.0, found.svd.truncate(rank)),)
                )
                notes[name] = {"cut_energy": dropped_share(found, rank)}
                if self.options.error_feedback:
                    extra |= pack_svd("cut", name, tail_of(found.svd, rank))
            return next_state(replace(state, extra=extra), changes, self.options, notes=notes)

        return OpenRound(state, sent, clients, products=products, close=close)


def _with_last_cut(state: State, name: str, total: MatrixSum) -> MatrixSum:
    left = unpack_svd(state.extra, "cut", name)
    return total if left is None else replace(total, terms=(*total.terms, svd_term(1.0, left)))


def rank_for_energy(S: torch.Tensor, threshold: float) -> int:
    """The fewest leading values of ``S`` whose squares make up ``threshold`` of all."""
    energy = S.double().square().cumsum(0)
    if energy.numel() == 0:
        return 0
    return int((energy < threshold * energy[-1]).sum()) + 1
