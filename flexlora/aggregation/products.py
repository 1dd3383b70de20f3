"""The weighted sum of products that FlexLoRA and its relatives end in, exact and order-free.

``sum_k w_k left_k right_k`` per module: the terms are kept until the round closes, then stacked in
the order of their keys (never of their arrival), so the same clients give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from flexlora.aggregation.base import State, Update
from flexlora.aggregation.state import GlobalChange
from flexlora.errors import UpdateRefused
from flexlora.linalg import FactoredSVD, stack_products, svd_of_product

__all__ = ["Term", "UpdateBuffer", "next_state", "product_terms", "svd_terms"]

Term = tuple[float, Tensor, Tensor]


class UpdateBuffer:
    """The updates of a round by client, given back in the order of the client ids.

    Raises:
        UpdateRefused: a second update of a client that has already been counted.
    """

    def __init__(self) -> None:
        self._updates: dict[str, Update] = {}

    def add(self, update: Update) -> None:
        if update.client_id in self._updates:
            raise UpdateRefused(f"client {update.client_id}: a second update in the same round.")
        self._updates[update.client_id] = update

    def __len__(self) -> int:
        return len(self._updates)

    def weighted(self) -> list[tuple[float, Update]]:
        """``(p_k, update)`` with p_k the share of the examples among those that arrived."""
        ordered = [self._updates[client_id] for client_id in sorted(self._updates)]
        total = sum(update.num_examples for update in ordered)
        return [(update.num_examples / total, update) for update in ordered]


def product_terms(weighted: Iterable[tuple[float, Update]], module: str) -> list[Term]:
    """``(p_k s_k, B_k, A_k)`` of one module: the scaling goes inside the product."""
    terms = []
    for share, update in weighted:
        factors = update.adapter[module]
        terms.append((share * factors.scaling, factors.lora_B, factors.lora_A))
    return terms


def svd_terms(weight: float, svd: FactoredSVD) -> Term:
    """``weight * U diag(S) Vh`` as one term."""
    return weight, svd.U.double() * svd.S.double(), svd.Vh


def next_state(state: State, terms: Mapping[str, list[Term]], *, max_rank: int) -> State:
    """The state whose change is the sum of ``terms`` per module, kept at ``max_rank`` directions.

    What the cap drops is reported as a share of the energy (Eckart-Young: the smallest possible).
    """
    modules, kept, total = {}, 0.0, 0.0
    for name, svd in state.change.items():
        left, right = stack_products(terms[name])
        exact = svd_of_product(left, right)
        capped = exact.truncate(max_rank)
        total += float(exact.S.square().sum())
        kept += float(capped.S.square().sum())
        dtype = svd.U.dtype
        modules[name] = FactoredSVD(
            U=capped.U.to(dtype).contiguous(),
            S=capped.S.to(dtype).contiguous(),
            Vh=capped.Vh.to(dtype).contiguous(),
        )
    return State(
        round=state.round + 1,
        change=GlobalChange(modules),
        dropped_energy=1.0 - kept / total if total > 0 else 0.0,
        extra=state.extra,
    )
