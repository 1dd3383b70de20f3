"""Error feedback: a client adds the rounding error of its last upload to the next one.

    products   M = s B A + E   T_r(M) is sent   E <- M - what the server decodes
    factors    F = B + e       F is sent        e <- F - what the server decodes

Products are for methods that add up products, factors for those that add up changes of one factor
beside a fixed other, whose rows keep their meaning from round to round. In both

    sum over rounds of what was decoded = sum of what was trained - the last E

so that the loss by rounding does not grow with the rounds (Karimireddy et al., ICML 2019, arXiv
1901.09847). One round's error has at most twice the rank of the factors; the strongest directions
of E are stored, up to four times that rank.

Downwards nothing is stored: ``T_r(G)`` is cut from the exact ``G`` in every round, and a method
subtracts what its client decoded. That holds for methods that add changes to ``G``; those that
replace ``G`` by the mean of the replies take the download's rounding with it, and lose a change
below its step in every round.
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

STORED_RANKS = 4  # times that of the factors: what one round rounds away has twice their rank
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
    """Refuse int8 for a method that would lose changes by it.

    Raises:
        UserError: with the methods that can use int8.
    """
    if dtype != "int8" or feedback_space(method, error_feedback=error_feedback):
        return
    why = "puts the mean of what comes back, with the rounding of what was sent, in the place of G"
    if method == "raflora":
        why = "weighs single terms of an update, which error feedback mixes"
    if method == "basis":
        why = "sends other rows every round, so that what rounding dropped fits into no next upload"
    also = " (or method.error-feedback=true)" if method == "flexlora" else ""
    others = ", ".join(name for name in METHODS if feedback_space(name))
    raise UserError(
        f"wire.dtype is int8, which method.name={method} cannot use, since it {why}; use "
        f"wire.dtype=bfloat16{also}, or one of {others}."
    )


def compensated(
    adapter: Adapter, error: Adapter | None, space: str, labels: Sequence[str] = FACTORS
) -> Adapter:
    """``adapter`` plus the stored ``error``, at the adapter's ranks.

    Raises:
        UserError: an error of other modules or shapes.
    """
    if error is None:
        return adapter
    add = {"products": _plus_product, "factors": _plus_factors}[space]
    return Adapter(
        {name: add(new, _error_of(error, name, new), labels) for name, new in adapter.items()}
    )


def lost(
    adapter: Adapter,
    error: Adapter | None,
    decoded: Adapter,
    space: str,
    labels: Sequence[str] = FACTORS,
) -> Adapter:
    """``adapter + error - decoded``, the next error, with scaling 1."""
    left = {"products": _lost_product, "factors": _lost_factors}[space]
    return Adapter(
        {
            name: left(new, _error_of(error, name, new), decoded[name], labels)
            for name, new in adapter.items()
        }
    )


def _error_of(error: Adapter | None, name: str, new: LoRAFactors) -> LoRAFactors | None:
    """The stored error of a module, None without one."""
    if error is None:
        return None
    stored = error.get(name)
    if stored is None or (stored.out_features, stored.in_features) != (
        new.out_features,
        new.in_features,
    ):
        raise UserError(
            f"module '{name}': the stored rounding error has another shape; was it made "
            "with another target list?"
        )
    return stored


def _plus_product(
    new: LoRAFactors, error: LoRAFactors | None, labels: Sequence[str]
) -> LoRAFactors:
    """``T_r(s B A + E)`` as factors in the basis of ``new``; O((out + in) k^2 + k^3)."""
    if set(labels) != set(FACTORS):
        raise ValueError(f"{', '.join(labels)} alone cannot hold a sum of products.")
    if error is None or not bool(error.lora_B.any()):
        return new
    left, right = stack_products([_term(1.0, new), _term(1.0, error)])
    return _in_basis(new, svd_of_product(left, right).truncate(new.rank))


def _in_basis(new: LoRAFactors, svd: FactoredSVD) -> LoRAFactors:
    """``U S Vh`` with the rows of new ``lora_A`` projected on Vh: B' = U S (A V)^+ / s.

    So both factors stay near the new ones. If the projected rows do not span Vh, ``lora_A`` is
    Vh itself.
    """
    turned = new.lora_A.double() @ svd.Vh.T
    spread = torch.linalg.svdvals(turned)
    lora_A, lora_B = turned @ svd.Vh, svd.U * svd.S
    if float(spread[-1]) * WORST_CONDITION > float(spread[0]):
        lora_B = lora_B @ torch.linalg.pinv(turned)
    else:
        missing = new.rank - svd.rank
        lora_A = torch.nn.functional.pad(svd.Vh, (0, 0, 0, missing))
        lora_B = torch.nn.functional.pad(lora_B, (0, missing))
    return replace(new, lora_A=lora_A.to(new.lora_A), lora_B=(lora_B / new.scaling).to(new.lora_B))


def _lost_product(
    new: LoRAFactors, error: LoRAFactors | None, decoded: LoRAFactors, labels: Sequence[str]
) -> LoRAFactors:
    """The strongest ``STORED_RANKS * r`` directions of ``s B A + E - decoded``.

    Directions below float32's rounding of the product are dropped.
    """
    parts = [_term(1.0, new), _term(-1.0, decoded)] + ([_term(1.0, error)] if error else [])
    svd = svd_of_product(*stack_products(parts))
    noise = torch.finfo(torch.float32).eps * new.scaling * product_norm(new.lora_B, new.lora_A)
    rank = min(STORED_RANKS * new.rank, int((noise < svd.S).sum()))
    if rank == 0:
        return zero_factors(new)
    top = svd.truncate(rank)
    return LoRAFactors(
        lora_A=top.Vh.float().contiguous(),
        lora_B=(top.U * top.S).float().contiguous(),
        alpha=float(rank),
    )


def _term(weight: float, factors: LoRAFactors) -> tuple[float, Tensor, Tensor]:
    return weight * factors.scaling, factors.lora_B, factors.lora_A


def _plus_factors(
    new: LoRAFactors, error: LoRAFactors | None, labels: Sequence[str]
) -> LoRAFactors:
    """The factors in ``labels`` plus the error of their rows and columns."""
    if error is None:
        return new
    A, B = _widened(error, new.rank)
    lora_A, lora_B = new.lora_A, new.lora_B
    if "lora_A" in labels:
        lora_A = (lora_A.double() + A[: new.rank]).to(lora_A)
    if "lora_B" in labels:
        lora_B = (lora_B.double() + B[:, : new.rank] / new.scaling).to(lora_B)
    return replace(new, lora_A=lora_A, lora_B=lora_B)


def _lost_factors(
    new: LoRAFactors, error: LoRAFactors | None, decoded: LoRAFactors, labels: Sequence[str]
) -> LoRAFactors:
    """The error of ``A`` and of ``s B``; unchanged for a factor that was not sent."""
    A, B = _widened(zero_factors(new) if error is None else error, new.rank)
    if "lora_A" in labels:
        A[: new.rank] += new.lora_A.double() - decoded.lora_A.double()
    if "lora_B" in labels:
        B[:, : new.rank] += new.scaling * (new.lora_B.double() - decoded.lora_B.double())
    return LoRAFactors(lora_A=A.float(), lora_B=B.float(), alpha=float(A.shape[0]))


def _widened(error: LoRAFactors, rank: int) -> tuple[Tensor, Tensor]:
    """``e_A`` and ``e_B`` of scaling 1 in float64 with at least ``rank`` rows and columns."""
    missing = max(0, rank - error.rank)
    pad = torch.nn.functional.pad
    A = pad(error.lora_A.double(), (0, 0, 0, missing))
    return A.clone(), pad(error.scaling * error.lora_B.double(), (0, missing)).clone()
