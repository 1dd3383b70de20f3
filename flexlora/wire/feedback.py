"""What rounding takes from an upload is kept by its client and joins the next one.

    products   M = s B A + E   T_r(M) is sent   E <- M - what the server decodes
    factors    F = B + e       F is sent        e <- F - what the server decodes

The first is for methods that add up products, the second for those that add up changes of one
factor beside a fixed other, whose rows mean the same from round to round. Either way

    sum over rounds of what was decoded = sum of what was trained - the last E

so that what rounding loses does not grow with the rounds (error feedback: Karimireddy et al., ICML
2019, arXiv 1901.09847). One round's rounding has at most twice the rank of the factors; of E four
times that rank is kept, the strongest directions. Where clients begin in fresh directions each
time, an upload has room for little of what others left, and it is some rounds' rounding that stays.

Downwards nothing need be kept: ``T_r(G)`` is cut from the exact ``G`` anew in every round, and what
a method subtracts is what its client decoded. This holds for methods that add changes to ``G``;
those that put the mean of what comes back in the place of ``G`` take the rounding of the download
with it, and a change below its step is lost again in every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexlora.aggregation import METHODS, method_class
from flexlora.algebra.linalg import FactoredSVD, product_norm, stack_products, svd_of_product
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter, LoRAFactors, zero_factors
from flexlora.wire.encoding import FACTORS

__all__ = [
    "check_wire",
    "compensated",
    "feedback_space",
    "lost",
]

KEPT_RANKS = 4  # times that of the factors: what one round rounds away has twice their rank
WORST_CONDITION = 1e3


def feedback_space(method: str, *, error_feedback: bool = False) -> str:
    """The ``wire_space`` of the method: ``products``, ``factors``, or "" where int8 loses changes.

    With ``error_feedback`` the server's rule for flexlora is that of the residual form.
    """
    chosen = method_class(method)
    has_option = "error_feedback" in chosen.Options.model_fields
    options: dict[str, Any] = {"error_feedback": error_feedback} if has_option else {}
    return chosen(chosen.Options(**options)).wire_space


def check_wire(dtype: str, method: str, *, error_feedback: bool = False) -> None:
    """Refuse int8 for a method that would lose by it in every round.

    Raises:
        UserError: with the methods that can use it.
    """
    if dtype != "int8" or feedback_space(method, error_feedback=error_feedback):
        return
    why = "puts the mean of what comes back, with the rounding of what was sent, in the place of G"
    if method == "raflora":
        why = "weighs single terms of an update, which error feedback mixes"
    also = " (or method.error-feedback=true)" if method == "flexlora" else ""
    others = ", ".join(name for name in METHODS if feedback_space(name))
    raise UserError(
        f"wire.dtype is int8, which method.name={method} cannot use, since it {why}; use "
        f"wire.dtype=bfloat16{also}, or one of {others}."
    )


def compensated(
    adapter: Adapter, error: Adapter | None, space: str, labels: Sequence[str] = FACTORS
) -> Adapter:
    """What is sent in the place of ``adapter``, at its ranks: the same where nothing was lost.

    Raises:
        UserError: an error of other modules or shapes.
    """
    if error is None:
        return adapter
    add = {"products": _plus_product, "factors": _plus_factors}[space]
    return Adapter(
        {name: add(own, _error_of(error, name, own), labels) for name, own in adapter.items()}
    )


def lost(
    adapter: Adapter,
    error: Adapter | None,
    decoded: Adapter,
    space: str,
    labels: Sequence[str] = FACTORS,
) -> Adapter:
    """What ``adapter`` and ``error`` together are more than ``decoded``, of scaling 1."""
    left = {"products": _lost_product, "factors": _lost_factors}[space]
    return Adapter(
        {
            name: left(own, _error_of(error, name, own), decoded[name], labels)
            for name, own in adapter.items()
        }
    )


def _error_of(error: Adapter | None, name: str, own: LoRAFactors) -> LoRAFactors | None:
    """What is kept of a module, None where that is nothing."""
    if error is None:
        return None
    kept = error.get(name)
    if kept is None or (kept.out_features, kept.in_features) != (own.out_features, own.in_features):
        raise UserError(
            f"module '{name}': what was kept of earlier rounding is not of its shape; was it made "
            "with another target list?"
        )
    return kept


def _plus_product(
    own: LoRAFactors, error: LoRAFactors | None, labels: Sequence[str]
) -> LoRAFactors:
    """``T_r(s B A + E)`` as factors in the basis of ``own``; O((out + in) k^2 + k^3)."""
    if set(labels) != set(FACTORS):
        raise ValueError(f"{', '.join(labels)} alone cannot hold a sum of products.")
    if error is None or not bool(error.lora_B.any()):
        return own
    left, right = stack_products([_term(1.0, own), _term(1.0, error)])
    return _in_the_basis_of(own, svd_of_product(left, right).truncate(own.rank))


def _in_the_basis_of(own: LoRAFactors, svd: FactoredSVD) -> LoRAFactors:
    """``U S Vh`` with the ``lora_A`` of ``own``, laid into the rows of Vh: B' = U S (A V)^+ / s.

    So both factors stay near what training made of them, and near what it began with. Where the
    rows of ``lora_A`` do not span Vh they are its own directions.
    """
    turned = own.lora_A.double() @ svd.Vh.T
    spread = torch.linalg.svdvals(turned)
    lora_A, lora_B = turned @ svd.Vh, svd.U * svd.S
    if float(spread[-1]) * WORST_CONDITION > float(spread[0]):
        lora_B = lora_B @ torch.linalg.pinv(turned)
    else:
        missing = own.rank - svd.rank
        lora_A = torch.nn.functional.pad(svd.Vh, (0, 0, 0, missing))
        lora_B = torch.nn.functional.pad(lora_B, (0, missing))
    return replace(own, lora_A=lora_A.to(own.lora_A), lora_B=(lora_B / own.scaling).to(own.lora_B))


def _lost_product(
    own: LoRAFactors, error: LoRAFactors | None, decoded: LoRAFactors, labels: Sequence[str]
) -> LoRAFactors:
    """The strongest ``KEPT_RANKS * r`` directions of ``s B A + E - (what was decoded)``.

    Those below float32's rounding of the product itself are nothing.
    """
    parts = [_term(1.0, own), _term(-1.0, decoded)] + ([_term(1.0, error)] if error else [])
    svd = svd_of_product(*stack_products(parts))
    noise = torch.finfo(torch.float32).eps * own.scaling * product_norm(own.lora_B, own.lora_A)
    rank = min(KEPT_RANKS * own.rank, int((noise < svd.S).sum()))
    if rank == 0:
        return zero_factors(own)
    top = svd.truncate(rank)
    return LoRAFactors(
        lora_A=top.Vh.float().contiguous(),
        lora_B=(top.U * top.S).float().contiguous(),
        alpha=float(rank),
    )


def _term(weight: float, factors: LoRAFactors) -> tuple[float, Tensor, Tensor]:
    return weight * factors.scaling, factors.lora_B, factors.lora_A


def _plus_factors(
    own: LoRAFactors, error: LoRAFactors | None, labels: Sequence[str]
) -> LoRAFactors:
    """The factors that ``labels`` names and what was lost of their rows and columns."""
    if error is None:
        return own
    A, B = _widened(error, own.rank)
    lora_A, lora_B = own.lora_A, own.lora_B
    if "lora_A" in labels:
        lora_A = (lora_A.double() + A[: own.rank]).to(lora_A)
    if "lora_B" in labels:
        lora_B = (lora_B.double() + B[:, : own.rank] / own.scaling).to(lora_B)
    return replace(own, lora_A=lora_A, lora_B=lora_B)


def _lost_factors(
    own: LoRAFactors, error: LoRAFactors | None, decoded: LoRAFactors, labels: Sequence[str]
) -> LoRAFactors:
    """What is lost of ``A`` and of ``s B``; of a factor that was not sent, what was lost before."""
    A, B = _widened(zero_factors(own) if error is None else error, own.rank)
    if "lora_A" in labels:
        A[: own.rank] += own.lora_A.double() - decoded.lora_A.double()
    if "lora_B" in labels:
        B[:, : own.rank] += own.scaling * (own.lora_B.double() - decoded.lora_B.double())
    return LoRAFactors(lora_A=A.float(), lora_B=B.float(), alpha=float(A.shape[0]))


def _widened(error: LoRAFactors, rank: int) -> tuple[Tensor, Tensor]:
    """``e_A`` and ``e_B`` of scaling 1 in float64 with at least ``rank`` rows and columns."""
    missing = max(0, rank - error.rank)
    pad = torch.nn.functional.pad
    A = pad(error.lora_A.double(), (0, 0, 0, missing))
    return A.clone(), pad(error.scaling * error.lora_B.double(), (0, missing)).clone()
