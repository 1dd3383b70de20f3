"""The interface every aggregation method keeps, and what goes in and comes out of it.

A method is stateful for one round: ``begin(state, sent)``, ``add(update)`` for each reply in any
order, ``finish() -> state``. Before the round ``start(...)`` says what a rank class is sent:
factors to train, factors to carry frozen beside them, and which of the trained ones get gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Protocol

import torch

from flexlora.adapters import Adapter, LoRAFactors
from flexlora.aggregation.state import GlobalChange
from flexlora.errors import UpdateRefused, nearest
from flexlora.linalg import product_norm
from flexlora.ranks import RankClass

__all__ = ["Factoring", "Law", "Method", "Start", "State", "Update", "check_update"]


class Law:
    """The laws a method may declare; ``tests/test_methods.py`` checks exactly the declared ones."""

    ORDER = "the order of the clients does not matter"
    SCALE_OF_WEIGHTS = "multiplying all num_examples by a constant does not matter"
    ONE_CLIENT = "one client at any rank reproduces its own delta_weight"
    ZERO_TRAINING = "a round in which nobody trained changes nothing"
    AVERAGE_OF_PRODUCTS = "from G = 0 the result is the weighted sum of the products"


@dataclass(frozen=True, kw_only=True)
class Factoring:
    """How ``T_r(G)`` becomes factors: alpha, plain or rsLoRA scaling, the split, the seed."""

    alpha: float
    rslora: bool = False
    singular_values: str = "b-heavy"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class State:
    """What the server carries from round to round. ``round`` 0 is before any training."""

    round: int
    change: GlobalChange
    dropped_energy: float = 0.0
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def one_round_later(self) -> State:
        """The same state after a round that counted nobody."""
        return replace(self, round=self.round + 1, dropped_energy=0.0)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a client of one rank class is sent, as it arrives there (after the wire).

    ``trained`` are the factors it starts from; ``carried`` are frozen beside them (None: nothing);
    ``trainable`` names the factors that get gradients. With ``gradient_batches`` the client first
    turns ``lora_A`` into the top singular space of its own gradient over that many batches.
    """

    rank_class: RankClass
    base_round: int
    trained: Adapter
    carried: Adapter | None = None
    trainable: tuple[str, ...] = ("lora_A", "lora_B")
    gradient_batches: int = 0
    digest: str = ""

    def sealed(self) -> Start:
        """The same start with the digest of what it holds."""
        parts = [self.trained.digest(), self.carried.digest() if self.carried else ""]
        return replace(self, digest="+".join(part[:32] for part in parts))

    def served(self) -> Adapter:
        """What a model of this class is: trained and carried factors side by side.

        ``s B A + c Q P = [s B, c Q] @ [A; P]``, with alpha chosen so that the scaling is 1. Fresh
        factors, whose ``lora_B`` is zero, add nothing and are left out.
        """
        if self.carried is None:
            return self.trained
        if not any(bool(factors.lora_B.any()) for factors in self.trained.values()):
            return self.carried
        modules = {}
        for name, own in self.trained.items():
            other = self.carried[name]
            modules[name] = LoRAFactors(
                lora_A=torch.cat([own.lora_A, other.lora_A]),
                lora_B=torch.cat([own.scaling * own.lora_B, other.scaling * other.lora_B], dim=1),
                alpha=float(own.rank + other.rank),
            )
        return Adapter(modules)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a client sends back: trained factors, its number of examples, where it started."""

    client_id: str
    adapter: Adapter
    num_examples: int
    rank_class: str = ""
    base_round: int = 0
    digest: str = ""


class Method(Protocol):
    """One aggregation method for one run. Its file names the paper and the equation."""

    name: str
    laws: frozenset[str]

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        """What ``rank_class`` is sent in the round after ``state``."""

    def begin(self, state: State, sent: Mapping[str, Start]) -> None:
        """Open a round: ``sent`` maps the name of a rank class to the start its clients decoded."""

    def add(self, update: Update) -> None:
        """Fold in one checked update; a refused one leaves the round as it was."""

    def finish(self) -> State:
        """The next state. Without any update it is the last one, one round later."""


def check_update(
    update: Update, expected: Adapter, *, digest: str | None = None, max_norm: float = 0.0
) -> None:
    """Refuse an update that must not reach the sum; ``expected`` is what this client was sent.

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
        want = expected[name]
        for label in ("lora_A", "lora_B"):
            got, sent = getattr(factors, label), getattr(want, label)
            if got.shape != sent.shape:
                raise UpdateRefused(
                    f"{who}, module '{name}': {label} has shape {tuple(got.shape)}, expected "
                    f"{tuple(sent.shape)} for rank {want.rank}. "
                    "Was this client assigned another rank this round?"
                )
            if got.dtype != sent.dtype:
                raise UpdateRefused(
                    f"{who}, module '{name}': {label} is {got.dtype}, expected {sent.dtype}."
                )
            if not bool(torch.isfinite(got).all()):
                raise UpdateRefused(f"{who}, module '{name}': {label} holds NaN or infinity.")
        if (factors.alpha, factors.rslora) != (want.alpha, want.rslora):
            raise UpdateRefused(
                f"{who}, module '{name}': alpha {factors.alpha} (rslora={factors.rslora}), "
                f"expected {want.alpha} (rslora={want.rslora})."
            )
        energy += (factors.scaling * product_norm(factors.lora_B, factors.lora_A)) ** 2
    # Finite factors can have a product that float32 cannot hold.
    bound = max_norm or torch.finfo(torch.float32).max
    if not math.sqrt(energy) <= bound:
        raise UpdateRefused(
            f"{who}: the update's norm is {math.sqrt(energy):.3g}, the bound is {bound:.3g}."
        )
