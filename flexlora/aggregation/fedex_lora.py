"""FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432): mean factors and an exact residual.

    A <- sum_k p_k pad(A_k),  B <- sum_k p_k pad(s_k B_k)
    W <- W + mean(s B A) - mean(s B) mean(A)

The factors are averaged as in FedIT and the error of that is added to the frozen weights, so the
model after a round is the exact mean of the clients' models. Here the residual is carried as
factors: a client of rank r trains the first r rows and columns and carries ``G`` minus their
product, so the server adds exactly the change that training made, at any ranks.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from flexlora.aggregation.engine.held_factors import first_rows
from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import UNCAPPED, StepOptions
from flexlora.aggregation.engine.product_sums import factors_term, svd_term
from flexlora.aggregation.engine.server_step import moved_by
from flexlora.aggregation.engine.starts import Factoring, LocalPlan, Start
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.algebra.decompose import MatrixSum, decompose
from flexlora.algebra.linalg import FactoredSVD, product_norm
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.ranks import RankClass

__all__ = ["FedExLoRA"]


class FedExLoRA:
    """FedIT's mean factors, and the error of that mean added to the base weights."""

    name = "fedex-lora"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS})
    needs = Needs(products=True, starts=True, factors=True)
    wire_space = "products"

    Options = StepOptions

    def __init__(self, options: StepOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        trained = first_rows(state, rank_class.ranks(state.change.shapes), factoring)
        return Start(
            rank_class=rank_class,
            base_round=state.round,
            trained=trained,
            carried=_left_out(state.change, trained, factoring),
            local=LocalPlan(merge=True),
        )

    def close(self, state: State, sums: Sums) -> State:
        extra = dict(state.extra)
        for name in state.change:
            extra[f"lora_A/{name}"], extra[f"lora_B/{name}"] = sums.factors.mean(name)
        return moved_by(replace(state, extra=extra), sums.products - sums.starts, self.options)


def _left_out(change: GlobalChange, trained: Adapter, factoring: Factoring) -> Adapter | None:
    """``G - s B A`` of every module as factors; None if it is zero for all modules."""
    sums = {
        name: MatrixSum(
            shape=svd.shape, terms=(svd_term(1.0, svd), factors_term(-1.0, trained[name]))
        )
        for name, svd in change.items()
    }
    dtype = next(iter(change.values())).U.dtype
    parts = decompose(sums, max_rank=UNCAPPED, dtype=dtype)
    rest = GlobalChange(
        {
            name: part.svd.truncate(_above_rounding(part.svd, change[name], trained[name]))
            for name, part in parts.items()
        }
    )
    if not any(svd.rank for svd in rest.values()):
        return None
    return rest.full_rank_adapter(factoring.alpha, rslora=factoring.rslora)


def _above_rounding(rest: FactoredSVD, whole: FactoredSVD, trained: LoRAFactors) -> int:
    """Number of singular values of a difference above the rounding error of the subtraction.

    Where two equal matrices cancel, only rounding errors remain, which must not be sent.
    """
    size = trained.scaling * product_norm(trained.lora_B, trained.lora_A)
    size += float(whole.S[:1].sum())
    noise = max(min(rest.shape) * torch.finfo(torch.float64).eps, torch.finfo(whole.S.dtype).eps)
    return int((4.0 * noise * size < rest.S).sum())
