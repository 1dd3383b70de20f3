"""The base of a run: what the nodes report of theirs, by vote and by what the server knows itself.

A node reports a fingerprint, names and shapes of the target modules, and their orientation. The
server sizes its state and every start by them, so it believes no single node: all five must be
those that most able nodes report. Where the server has shapes of its own, from a checkpoint or from
the ``config.json`` of ``model.name``, nodes that agree with it go before any majority; of two
nodes, it tells apart the one that lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from flexlora.planning.base_modules import BaseModules
from flexlora.wire.jobs import Capability

__all__ = ["Base", "KnownBase", "choose_base", "most_common"]

Shapes = Mapping[str, tuple[int, int]]


class Base(NamedTuple):
    """What all members of a run must report alike."""

    fingerprint: str = ""
    modules: tuple[str, ...] = ()
    out_features: tuple[int, ...] = ()
    in_features: tuple[int, ...] = ()
    fan_in_fan_out: bool = False

    @classmethod
    def of(cls, report: Capability) -> Base:
        return cls(*(getattr(report, name) for name in cls._fields))

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` of every target module."""
        sides = zip(self.out_features, self.in_features, strict=True)
        return dict(zip(self.modules, sides, strict=True))

    def difference(self, report: Capability) -> str:
        """What a node reports otherwise, with what arrived and what was expected; empty if alike.

        A node of this base is told apart by its first module that differs.
        """
        other = Base.of(report)
        if other == self:
            return ""
        if other.fingerprint != self.fingerprint:
            return (
                f"another base model or other targets (fingerprint {other.fingerprint[:12]}, "
                f"expected {self.fingerprint[:12]})"
            )
        ours, theirs = self.shapes, other.shapes
        for name in (*ours, *theirs):
            if name not in theirs or name not in ours:
                has = "lacks" if name in ours else "has"
                return f"other targets: the report {has} module '{name}'"
            if ours[name] != theirs[name]:
                return (
                    f"module '{name}': [out, in] is {list(theirs[name])}, "
                    f"expected {list(ours[name])}"
                )
        if other.modules != self.modules:
            return "the same modules in another order"
        return f"fan_in_fan_out is {other.fan_in_fan_out}, expected {self.fan_in_fan_out}"


@dataclass(frozen=True, kw_only=True)
class KnownBase:
    """What the server knows of its base without the nodes: either may be unknown."""

    resumed: Shapes | None = None  # of the checkpoint that the run goes on from
    modules: BaseModules | None = None  # of the base's config.json

    def disagreements(self, base: Base) -> tuple[bool, bool]:
        """Whether a reported base differs from the checkpoint's, and from the ``config.json``."""
        resumed = self.resumed is not None and dict(self.resumed) != base.shapes
        if self.modules is None:
            return resumed, False
        fan = base.fan_in_fan_out
        return resumed, bool(self.modules.difference(base.shapes, fan_in_fan_out=fan))


def choose_base(reports: Iterable[Capability], known: KnownBase) -> Base:
    """The base of the run: first by what is known, then by votes, then by the reports' values."""
    votes = Counter(Base.of(report) for report in reports if not report.cause)
    if not votes:
        return Base()
    return min(votes, key=lambda base: (known.disagreements(base), -votes[base], base))


def most_common(texts: Iterable[str]) -> str:
    """The text that most reports have; of several the first in order."""
    votes = Counter(texts)
    return min(votes, key=lambda text: (-votes[text], text)) if votes else ""
