"""FLoRIST (MLSys 2026, arXiv 2506.09199): one compact adapter by a threshold on the energy.

    M = sum_k p_k s_k B_k A_k = U S V^T;   p = min {p : sum_{i<=p} S_i^2 >= tau |M|_F^2}
    W <- W + eta U_p S_p V_p^T;   new random factors

FLoRA's round with the sum of each round cut, module by module, to the fewest directions that hold
``tau`` of its energy; what the cut drops is reported by module as ``cut_energy``. With error
feedback it is added to the next round's sum.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import UNCAPPED, StepOptions, option
from flexlora.aggregation.engine.product_sums import svd_term
from flexlora.aggregation.engine.server_step import (
    dropped_share,
    moved_by,
    pack_svd,
    tail_of,
    unpack_svd,
)
from flexlora.aggregation.engine.starts import Factoring, Start
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.aggregation.flora import FLoRA
from flexlora.algebra.decompose import LazySums, MatrixSum, decompose
from flexlora.lora.ranks import RankClass

__all__ = ["FLoRIST", "rank_for_energy"]


class FLoRIST:
    """Adds the stack of a round's updates, truncated to a share of its energy, to ``G``."""

    name = "florist"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING})
    needs = Needs(products=True)
    wire_space = "products"

    class Options(StepOptions):
        energy_threshold: float = option(
            0.95, "energy of a round that the cut keeps", ge=1e-6, le=1.0
        )

    def __init__(self, options: Options) -> None:
        self.options = options
        if options.error_feedback:  # the last cut is added even without training
            self.laws = self.laws - {Law.ZERO_TRAINING}

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return FLoRA(self.options).start(state, rank_class, factoring)

    def close(self, state: State, sums: Sums) -> State:
        total, feedback = sums.products, self.options.error_feedback
        if feedback:
            total = total + _last_cuts(state)
        extra, changes, notes = dict(state.extra), {}, {}
        for name, found in decompose(total, max_rank=UNCAPPED, dtype=state.dtype).items():
            rank = rank_for_energy(found.svd.S, self.options.energy_threshold)
            term = svd_term(1.0, found.svd.truncate(rank))
            changes[name] = MatrixSum(shape=found.svd.shape, terms=(term,))
            notes[name] = {"cut_energy": dropped_share(found, rank)}
            if feedback:
                extra |= pack_svd("cut", name, tail_of(found.svd, rank))
        return moved_by(replace(state, extra=extra), changes, self.options, notes)


def _last_cuts(state: State) -> LazySums:
    """The directions that the last round's cut dropped, by module."""

    def cut(name: str) -> MatrixSum:
        dropped = unpack_svd(state.extra, "cut", name)
        terms = () if dropped is None else (svd_term(1.0, dropped),)
        return MatrixSum(shape=state.change[name].shape, terms=terms)

    return LazySums(state.change, cut)


def rank_for_energy(S: torch.Tensor, threshold: float) -> int:
    """The fewest leading values of ``S`` whose squares make up ``threshold`` of all."""
    energy = S.double().square().cumsum(0)
    if energy.numel() == 0:
        return 0
    return int((energy < threshold * energy[-1]).sum()) + 1
