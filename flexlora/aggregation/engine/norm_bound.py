"""A bound on the norm of an update, relative to those of the updates that were summed before.

Of each update three norms over all modules together, in float64:

    change   |s B A - start|,  how far training moved the product
    lora_A   |A|               bounded for the methods that average the factors themselves,
    lora_B   |s B|             where two factors of a small product can be large

An update is refused if one of them is more than ``factor`` times the median of the same norm: of
the updates that the last ``ROUNDS`` rounds summed, or, as long as those are fewer than ``LEAST``,
of these and the open round's own together. In the second case a round has to be complete before it
is decided. Norms of zero do not count, and of an even number the lower median is taken, so that of
two updates the larger one is judged. Most of the updates must be honest: a majority is the median.

What honest clients reach, by rank, task, method and number of steps, is in ``docs/log.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from statistics import median_low

from flexlora.aggregation.engine.server_rate import change_energy
from flexlora.lora.adapters import Adapter

__all__ = ["NormBound", "NormHistory", "Norms", "norms_of"]

ROUNDS = 5  # whose updates are remembered
LEAST = 3  # norms that make a median
NAMES = ("change", "lora_A", "lora_B")


@dataclass(frozen=True)
class Norms:
    """The squares of an update's three norms."""

    change: float
    lora_A: float
    lora_B: float


def norms_of(adapter: Adapter, start: Adapter) -> Norms:
    """The norms of an update that was trained from ``start``; O((m + n) r^2) a module."""
    A = B = 0.0
    for factors in adapter.values():
        A += float(factors.lora_A.double().square().sum())
        B += factors.scaling**2 * float(factors.lora_B.double().square().sum())
    return Norms(change_energy(adapter, start), A, B)


@dataclass(kw_only=True)
class NormHistory:
    """The norms of the updates that the last rounds summed; part of a checkpoint."""

    rounds: dict[int, list[Norms]] = field(default_factory=dict)

    def bound(self, factor: float) -> NormBound:
        """The bound of the next round."""
        known = [norms for at in sorted(self.rounds) for norms in self.rounds[at]]
        return NormBound(factor=factor, known=known)

    def learn(self, server_round: int, accepted: Sequence[Norms]) -> None:
        """Record the updates of a round that was summed, and forget the oldest round."""
        if accepted:
            self.rounds[server_round] = sorted(accepted, key=astuple)
        for old in sorted(self.rounds)[:-ROUNDS]:
            del self.rounds[old]

    def to_dict(self) -> dict[str, list[list[float]]]:
        """As values of JSON, which keep the bits."""
        return {str(at): [list(astuple(n)) for n in norms] for at, norms in self.rounds.items()}

    @staticmethod
    def from_dict(values: Mapping[str, Iterable[Sequence[float]]]) -> NormHistory:
        rounds = {int(at): [Norms(*three) for three in norms] for at, norms in values.items()}
        return NormHistory(rounds=rounds)


@dataclass(frozen=True, kw_only=True)
class NormBound:
    """``factor`` times the medians of the ``known`` norms; a factor of 0 is no bound."""

    factor: float
    known: Sequence[Norms] = ()

    @property
    def decides(self) -> bool:
        """Whether an update can be judged before its round is complete."""
        return self.factor == 0.0 or len(self.known) >= LEAST

    def with_round(self, norms: Iterable[Norms]) -> NormBound:
        """The bound once the norms of the open round are known too."""
        return NormBound(factor=self.factor, known=(*self.known, *norms))

    @cached_property
    def medians(self) -> dict[str, float]:
        """By name; a norm that was zero in all updates has none."""
        values = {n: [v for known in self.known if (v := getattr(known, n)) > 0.0] for n in NAMES}
        return {n: math.sqrt(median_low(found)) for n, found in values.items() if found}

    def refusal(self, norms: Norms) -> str:
        """Why an update of these norms is refused; empty if it is not."""
        for name, middle in self.medians.items() if self.factor else ():
            norm = math.sqrt(getattr(norms, name))
            if not norm <= self.factor * middle:
                return (
                    f"the norm of its {name} is {norm:.3g}, the median of the last updates "
                    f"{middle:.3g} and the bound {self.factor:g} times that "
                    "(server.max-norm-ratio)."
                )
        return ""
