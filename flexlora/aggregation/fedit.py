"""FedIT (Zhang et al., ICASSP 2024, arXiv 2305.05644), zero-padded where ranks differ.

    A <- sum_k p_k pad(A_k),    B <- sum_k p_k pad(s_k B_k)

The mean of the factors is not the mean of the products: their difference is the covariance of
``s_k B_k`` and ``A_k`` over the clients. It is here as the baseline that everybody knows. The
scaling is absorbed into ``lora_B`` before averaging, since another rank has another one;
a client of rank r is sent the first r rows and columns. Round one starts from a shared ``lora_A``
that is nested across ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flexlora.adapters import Adapter, LoRAFactors
from flexlora.aggregation.base import Factoring, Law, Start, State, Update
from flexlora.aggregation.products import UpdateBuffer
from flexlora.aggregation.state import GlobalChange
from flexlora.linalg import FactoredSVD, live_rows, svd_of_product
from flexlora.ranks import RankClass
from flexlora.seeds import generator

__all__ = ["FedIT"]


class FedIT:
    """Averages ``lora_A`` and ``lora_B`` apart; the state keeps both beside their product."""

    name = "fedit"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ONE_CLIENT})

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        ranks = rank_class.ranks(state.change.shapes)
        modules = {
            name: self._factors(state, name, rank, factoring) for name, rank in ranks.items()
        }
        return Start(rank_class=rank_class, base_round=state.round, trained=Adapter(modules))

    def _factors(self, state: State, name: str, rank: int, factoring: Factoring) -> LoRAFactors:
        """The first ``rank`` mean rows and columns; live rows beyond those that there are."""
        svd = state.change[name]
        out_features, in_features = svd.shape
        rows = live_rows(rank, in_features, generator(factoring.seed, "live", name))
        lora_A, lora_B = rows.to(svd.Vh.dtype), svd.U.new_zeros(out_features, rank)
        factors = LoRAFactors(
            lora_A=lora_A, lora_B=lora_B, alpha=factoring.alpha, rslora=factoring.rslora
        )
        if f"lora_A/{name}" in state.extra:
            mean_A, mean_B = state.extra[f"lora_A/{name}"], state.extra[f"lora_B/{name}"]
            known = min(rank, mean_A.shape[0])
            lora_A[:known] = mean_A[:known].to(lora_A.dtype)
            lora_B[:, :known] = (mean_B[:, :known] / factors.scaling).to(lora_B.dtype)
        return factors

    def begin(self, state: State, sent: Mapping[str, Start]) -> None:
        self._state, self._buffer = state, UpdateBuffer()

    def add(self, update: Update) -> None:
        self._buffer.add(update)

    def finish(self) -> State:
        if not len(self._buffer):
            return self._state.one_round_later()
        weighted = self._buffer.weighted()
        extra: dict[str, Tensor] = {}
        modules: dict[str, FactoredSVD] = {}
        for name, last in self._state.change.items():
            factors = [(share, update.adapter[name]) for share, update in weighted]
            mean_A = _padded_mean([(share, f.lora_A) for share, f in factors])
            mean_B = _padded_mean([(share * f.scaling, f.lora_B.T) for share, f in factors]).T
            svd, dtype = svd_of_product(mean_B, mean_A), last.U.dtype
            modules[name] = FactoredSVD(
                U=svd.U.to(dtype).contiguous(),
                S=svd.S.to(dtype).contiguous(),
                Vh=svd.Vh.to(dtype).contiguous(),
            )
            extra[f"lora_A/{name}"], extra[f"lora_B/{name}"] = mean_A, mean_B.contiguous()
        return State(round=self._state.round + 1, change=GlobalChange(modules), extra=extra)


def _padded_mean(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """``sum_k w_k pad(M_k)`` in float64, every ``M_k [rank_k, n]`` padded with zero rows."""
    rank = max(matrix.shape[0] for _, matrix in terms)
    mean = torch.zeros(rank, terms[0][1].shape[1], dtype=torch.float64)
    for weight, matrix in terms:
        mean[: matrix.shape[0]] += weight * matrix.double()
    return mean
