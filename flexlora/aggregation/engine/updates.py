"""One client's update, and the checks that it must pass before it is added to a sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

import torch

from flexlora.aggregation.engine.norm_bound import Norms
from flexlora.aggregation.engine.starts import LocalPlan
from flexlora.errors import UpdateRefused, nearest
from flexlora.lora.adapters import Adapter, LoRAFactors

__all__ = ["LARGEST_NORM", "Update", "check_update"]

# Of a module's factors and of their product: weights times it, sums of thousands of such, and the
# product of two mean factors are still finite in float32.
LARGEST_NORM = 2.0**60


@dataclass(frozen=True, kw_only=True)
class Update:
    """A client's reply: trained factors, number of examples, and which start it trained from.

    ``rank_class`` is the name of that start and ``digest`` its content. A ``late`` update belongs
    to an earlier round (``base_round``). Whatever weight the method gives an update, it counts
    ``discount`` times that in all sums (``sums.py``). Without ``norms`` no norm bound applies.

    Raises:
        ValueError: a discount outside 0 to 1.
    """

    client_id: str
    adapter: Adapter
    num_examples: int
    rank_class: str = ""
    base_round: int = 0
    digest: str = ""
    late: bool = False
    discount: float = 1.0
    norms: Norms | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.discount <= 1.0:
            raise ValueError(f"discount is {self.discount}, expected 0 to 1.")

    @property
    def key(self) -> str:
        """Unique among the updates of a round, in which a client may have a late one too."""
        return f"{self.client_id}@{self.base_round}" if self.late else self.client_id


def check_update(
    update: Update,
    expected: Adapter,
    *,
    digest: str | None = None,
    local: LocalPlan = LocalPlan(),
) -> None:
    """Refuse an invalid update; ``expected`` is the adapter that this client was sent.

    Under ``local`` a reply may have fewer terms than sent (pruning), at the scaling that was sent.

    Raises:
        UpdateRefused: a module missing or unknown, a shape, rank, alpha or dtype other than sent,
            NaN or infinity, factors too large to be summed in float32 (``LARGEST_NORM``), a number
            of examples that is not positive, or another start than sent.
    """
    who = f"client {update.client_id}"
    n = update.num_examples
    if not isinstance(n, Integral) or isinstance(n, bool) or n <= 0:
        raise UpdateRefused(f"{who}: num_examples is {n!r}, expected a positive whole number.")
    if digest is not None and update.digest != digest:
        raise UpdateRefused(
            f"{who}: the update started from {update.digest[:12] or 'nothing'}, this round sent "
            f"{digest[:12]}. Is it a reply to an older round?"
        )
    missing, unknown = set(expected) - set(update.adapter), set(update.adapter) - set(expected)
    if missing or unknown:
        name = sorted(missing or unknown)[0]
        what = "lacks" if missing else "has unknown"
        raise UpdateRefused(
            f"{who}: the update {what} module '{name}'.{nearest(name, expected)} "
            "Was another base or target list used?"
        )
    for name, factors in update.adapter.items():
        _check_factors(f"{who}, module '{name}'", factors, expected[name], local)
        _check_sizes(f"{who}, module '{name}'", factors)


def _check_sizes(who: str, factors: LoRAFactors) -> None:
    """Finite factors can have a product that float32 cannot hold: ``|s B A| <= |s B| |A|``."""
    A = float(factors.lora_A.double().norm())
    B = factors.scaling * float(factors.lora_B.double().norm())
    if not max(A, B, A * B) <= LARGEST_NORM:
        raise UpdateRefused(
            f"{who}: the norms of lora_A and of scaling * lora_B are {A:.3g} and {B:.3g}; "
            f"they and their product must not exceed {LARGEST_NORM:.3g}. Did training diverge?"
        )


def _check_factors(who: str, got: LoRAFactors, want: LoRAFactors, local: LocalPlan) -> None:
    """Check shapes, dtype, finite values and scaling of one module's factors."""
    rank = want.rank
    if local.prune_factor and 1 <= got.rank < rank:
        rank = got.rank
    shapes = {"lora_A": (rank, want.in_features), "lora_B": (want.out_features, rank)}
    for label, shape in shapes.items():
        tensor, sent = getattr(got, label), getattr(want, label)
        if tuple(tensor.shape) != shape:
            raise UpdateRefused(
                f"{who}: {label} has shape {tuple(tensor.shape)}, expected {shape} for rank "
                f"{rank}. Was this client assigned another rank this round?"
            )
        if tensor.dtype != sent.dtype:
            raise UpdateRefused(f"{who}: {label} is {tensor.dtype}, expected {sent.dtype}.")
        if not bool(torch.isfinite(tensor).all()):
            raise UpdateRefused(f"{who}: {label} holds NaN or infinity.")
    alpha = want.alpha if rank == want.rank else want.scaling * got.alpha / got.scaling
    if got.rslora != want.rslora or not math.isclose(got.alpha, alpha, rel_tol=1e-12):
        raise UpdateRefused(
            f"{who}: alpha {got.alpha} (rslora={got.rslora}), "
            f"expected {alpha} (rslora={want.rslora})."
        )
