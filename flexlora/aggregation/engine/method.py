"""The interface every aggregation method keeps, and what goes in and comes out of it.

A method holds options only. ``start(...)`` says what a rank class is sent: factors to train,
factors to carry frozen beside them, which of the trained ones get gradients. ``begin(...)`` opens a
round, which takes ``add(update)`` for each reply in any order and ends in ``finish() -> state``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, ClassVar, Protocol

import torch

from flexlora.aggregation.engine.options import MethodOptions
from flexlora.aggregation.engine.starts import Factoring, LocalPlan, Start
from flexlora.aggregation.engine.state import GlobalChange
from flexlora.algebra.linalg import product_norm
from flexlora.errors import UpdateRefused, nearest
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.ranks import RankClass

__all__ = [
    "Factoring",
    "Law",
    "LocalPlan",
    "Method",
    "Round",
    "Start",
    "State",
    "Update",
    "check_update",
]


class Law:
    """The laws a method may declare; ``tests/test_methods.py`` checks exactly the declared ones.

    They are those of the method's rule: of the sgd step, without a cap on the rank of ``G``.
    """

    ORDER = "the order of the clients does not matter"
    SCALE_OF_WEIGHTS = "multiplying all num_examples by a constant does not matter"
    ONE_CLIENT = "one client at any rank reproduces its own delta_weight"
    ZERO_TRAINING = "a round in which nobody trained changes nothing"
    AVERAGE_OF_PRODUCTS = (
        "from G = 0 the change is the weighted sum of the products, times the server's rate"
    )


@dataclass(frozen=True, kw_only=True)
class State:
    """What the server carries from round to round. ``round`` 0 is before any training.

    ``extra`` holds a method's own tensors and is part of a checkpoint. ``modules`` says how the
    round went, module by module: the route, its seconds and error, the gap between averaging
    factors and averaging products.
    """

    round: int
    change: GlobalChange
    dropped_energy: float = 0.0
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)

    def one_round_later(self) -> State:
        """The same state after a round that counted nobody."""
        return replace(self, round=self.round + 1, dropped_energy=0.0, modules={})


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a client sends back: trained factors, its number of examples, where it started.

    ``rank_class`` names the start among those of the round; ``late`` is one of an earlier round,
    whose examples count ``discount`` times: ``p_k = d_k n_k / sum_j d_j n_j``.
    """

    client_id: str
    adapter: Adapter
    num_examples: int
    rank_class: str = ""
    base_round: int = 0
    digest: str = ""
    late: bool = False
    discount: float = 1.0

    def weighed(self) -> Update:
        """The update as the sums of a round take it: its discount is in ``num_examples``."""
        if self.discount == 1.0:
            return self
        examples: Any = self.discount * self.num_examples  # only here it is no whole number
        return replace(self, num_examples=examples, discount=1.0)

    @property
    def key(self) -> str:
        """What it is counted under: a client may answer this round and an earlier one."""
        return f"{self.client_id}@{self.base_round}" if self.late else self.client_id


class Round(Protocol):
    """One open round of a method."""

    def add(self, update: Update) -> None:
        """Fold in one checked update; a refused one leaves the round as it was."""

    def skip(self, client_id: str) -> None:
        """This client will not be added: nobody waits for it."""

    def finish(self) -> State:
        """The next state. Without any update it is the last one, one round later."""


class Method(Protocol):
    """One aggregation method: its options and nothing of any round. Its file names the paper."""

    name: str
    laws: frozenset[str]
    Options: ClassVar[type[MethodOptions]]

    def __init__(self, options: Any) -> None:
        """``options`` is an instance of the class's ``Options``."""

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        """What ``rank_class`` is sent in the round after ``state``."""

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> Round:
        """Open a round: ``sent`` maps the name of a rank class to the start its clients decoded.

        Starts of earlier rounds, of which updates may still come, stand there under other names.
        ``clients`` maps those who were asked to their class. With it updates are folded in as they
        come, in memory that does not grow with their number; without it they wait for the end.
        """


def check_update(
    update: Update,
    expected: Adapter,
    *,
    digest: str | None = None,
    max_norm: float = 0.0,
    local: LocalPlan = LocalPlan(),
) -> None:
    """Refuse an update that must not reach the sum; ``expected`` is what this client was sent.

    Under ``local`` a reply may have fewer terms than sent (pruning) or several times as many
    (restarts), at the scaling that was sent.

    Raises:
        UpdateRefused: a module missing or unknown, a shape, rank, alpha or dtype other than sent,
            NaN or infinity, a number of examples that is not positive, a norm beyond ``max_norm``
            (of the whole update's ``delta_weight``, 0 for no bound), or another start than sent.
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
    energy = 0.0
    for name, factors in update.adapter.items():
        _check_factors(f"{who}, module '{name}'", factors, expected[name], local)
        energy += (factors.scaling * product_norm(factors.lora_B, factors.lora_A)) ** 2
    # Finite factors can have a product that float32 cannot hold.
    bound = max_norm or torch.finfo(torch.float32).max
    if not math.sqrt(energy) <= bound:
        raise UpdateRefused(
            f"{who}: the update's norm is {math.sqrt(energy):.3g}, the bound is {bound:.3g}."
        )


def _check_factors(who: str, got: LoRAFactors, want: LoRAFactors, local: LocalPlan) -> None:
    """Shapes, dtype, numbers and scaling of one module's factors."""
    rank = want.rank * (1 + local.restarts)
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
