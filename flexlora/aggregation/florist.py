"""FLoRIST (MLSys 2026, arXiv 2506.09199): one compact adapter by a threshold on the energy.

    M = sum_k p_k s_k B_k A_k = U S V^T;   p = min {p : sum_{i<=p} S_i^2 >= tau |M|_F^2}
    W <- W + eta U_p S_p V_p^T;   new random factors

FLoRA's round with the sum of each round cut, module by module, to the fewest directions that hold
``tau`` of its energy. With error feedback what the cut drops is added to the next round's sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from flexlora.aggregation.base import Factoring, Law, Start, State
from flexlora.aggregation.flora import merged_start
from flexlora.aggregation.products import ProductSums, svd_term
from flexlora.aggregation.rounds import OpenRound
from flexlora.aggregation.steps import ServerStep, next_state, pack_svd, unpack_svd
from flexlora.decompose import MatrixSum, decompose
from flexlora.linalg import FactoredSVD
from flexlora.ranks import RankClass

__all__ = ["FLoRIST", "rank_for_energy"]


class FLoRIST:
    """Stacked updates, thresholded per round, merged.

    Raises:
        ValueError: a threshold outside (0, 1].
    """

    name = "florist"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING})

    def __init__(self, *, step: ServerStep = ServerStep(), energy_threshold: float = 0.95) -> None:
        if not 0.0 < energy_threshold <= 1.0:
            raise ValueError(f"energy_threshold is {energy_threshold}, expected (0, 1].")
        self.step, self.energy_threshold = step, energy_threshold
        if step.error_feedback:  # what an earlier cut dropped comes without any training
            self.laws = self.laws - {Law.ZERO_TRAINING}

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return merged_start(state, rank_class, factoring)

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> OpenRound:
        products = ProductSums(state.change.shapes)

        def close() -> State:
            sums = {name: products.take(name) for name in state.change}
            changes, extra = self._cut(state, sums)
            return next_state(replace(state, extra=extra), changes, self.step)

        return OpenRound(state, sent, clients, products=products, close=close)

    def _cut(
        self, state: State, sums: Mapping[str, MatrixSum]
    ) -> tuple[dict[str, MatrixSum], dict[str, torch.Tensor]]:
        extra, dtype = dict(state.extra), next(iter(state.change.values())).U.dtype
        if self.step.error_feedback:
            for name in sums:
                left = unpack_svd(extra, "cut", name)
                if left is not None:
                    terms = (*sums[name].terms, svd_term(1.0, left))
                    sums = {**sums, name: replace(sums[name], terms=terms)}
        changes = {}
        for name, result in decompose(sums, max_rank=1 << 30, dtype=dtype).items():
            kept = rank_for_energy(result.svd.S, self.energy_threshold)
            top = result.svd.truncate(kept)
            changes[name] = MatrixSum(shape=top.shape, terms=(svd_term(1.0, top),))
            if self.step.error_feedback:
                svd = result.svd
                tail = FactoredSVD(
                    U=svd.U[:, kept:].contiguous(),
                    S=svd.S[kept:].contiguous(),
                    Vh=svd.Vh[kept:].contiguous(),
                )
                extra |= pack_svd("cut", name, tail)
        return changes, extra


def rank_for_energy(S: torch.Tensor, threshold: float) -> int:
    """The fewest leading values of ``S`` whose squares make up ``threshold`` of all."""
    energy = S.double().square().cumsum(0)
    if energy.numel() == 0:
        return 0
    return int((energy < threshold * energy[-1]).sum()) + 1
