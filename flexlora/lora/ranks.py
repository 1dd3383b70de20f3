"""Rank classes: the trained rank of every module, and the carried rank.

A rank class is a name, a trained rank per module and a carried rank, that of the frozen factors,
which need no gradient and no optimizer state. All clients of a class are sent the same bytes.
``planning/rank_policies.py`` assigns classes to clients.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexlora.errors import UserError

__all__ = ["RankClass", "parse_shares", "parse_tiers", "quotas"]


@dataclass(frozen=True, kw_only=True)
class RankClass:
    """A trained rank, with exceptions for modules whose name matches a regular expression.

    ``carried_rank`` is the rank of the frozen global change beside the trained factors; 0 for the
    method's default.
    """

    name: str
    rank: int
    pattern: tuple[tuple[str, int], ...] = ()
    carried_rank: int = 0

    def __post_init__(self) -> None:
        for rank in (self.rank, *(rank for _, rank in self.pattern)):
            if rank < 1:
                raise UserError(
                    f"rank class '{self.name}' has rank {rank}, expected at least 1; "
                    "leave a client out instead of giving it rank 0."
                )

    def rank_of(self, module: str, out_features: int, in_features: int) -> int:
        """The trained rank of one module, capped at ``min(out_features, in_features)``."""
        wanted = next((r for regex, r in self.pattern if re.search(regex, module)), self.rank)
        return min(wanted, out_features, in_features)

    def ranks(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """The capped rank of every module of ``shapes`` (name to ``(out, in)``)."""
        return {name: self.rank_of(name, *shape) for name, shape in shapes.items()}

    @staticmethod
    def of(rank: int, *, carried_rank: int = 0) -> RankClass:
        """The class of one rank for all modules, named after it."""
        name = f"rank_{rank}" + (f"_carried_{carried_rank}" if carried_rank else "")
        return RankClass(name=name, rank=rank, carried_rank=carried_rank)

    @property
    def largest(self) -> int:
        """The largest rank that any module may train."""
        return max(self.rank, *(rank for _, rank in self.pattern)) if self.pattern else self.rank

    def lowered(self, rank: int) -> RankClass:
        """This class with all trained ranks capped at ``rank``."""
        if not self.pattern:
            return RankClass.of(min(self.rank, rank), carried_rank=self.carried_rank)
        pattern = tuple((regex, min(current, rank)) for regex, current in self.pattern)
        name = f"{self.name.partition('_to_')[0]}_to_{rank}"
        return replace(self, name=name, rank=min(self.rank, rank), pattern=pattern)

    def to_dict(self) -> dict[str, object]:
        """Plain values for a checkpoint; ``from_dict`` is the inverse."""
        return {
            "name": self.name,
            "rank": self.rank,
            "pattern": [list(item) for item in self.pattern],
            "carried_rank": self.carried_rank,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> RankClass:
        pattern = tuple((str(regex), int(rank)) for regex, rank in values["pattern"])
        return RankClass(**{**values, "pattern": pattern})


def parse_tiers(text: str) -> tuple[int, ...]:
    """``"4,8,16"`` as ascending ranks.

    Raises:
        UserError: not whole numbers, a rank below 1, or a rank named twice.
    """
    try:
        tiers = tuple(int(item) for item in text.split(","))
    except ValueError:
        raise UserError(
            f"ranks.tiers is '{text}', expected whole numbers separated by commas such as '4,8,16'."
        ) from None
    for rank in tiers:
        if rank < 1:
            raise UserError(f"ranks.tiers has rank {rank}, expected ranks of at least 1.")
    if len(set(tiers)) != len(tiers):
        raise UserError(f"ranks.tiers is '{text}' and names a rank twice, expected distinct ranks.")
    return tuple(sorted(tiers))


def parse_shares(text: str, num_tiers: int) -> tuple[float, ...]:
    """``"0.5,0.25,0.25"`` as shares that add up to 1, or ``"equal"``.

    Raises:
        UserError: another count than ``num_tiers``, a negative share, a sum other than 1.
    """
    if text.strip() == "equal":
        return (1.0 / num_tiers,) * num_tiers
    try:
        shares = tuple(float(item) for item in text.split(","))
    except ValueError:
        raise UserError(f"ranks.shares is '{text}', expected numbers or 'equal'.") from None
    if len(shares) != num_tiers:
        raise UserError(
            f"ranks.shares has {len(shares)} shares for {num_tiers} tiers; "
            "give one share per tier or ranks.shares=equal."
        )
    if not (min(shares) >= 0 and abs(sum(shares) - 1.0) <= 1e-6):
        raise UserError(
            f"ranks.shares is '{text}' and adds up to {sum(shares):g}, "
            "expected shares of at least 0 that add up to 1."
        )
    return shares


def quotas(shares: Sequence[float], count: int) -> list[int]:
    """Whole numbers that add up to ``count``, by largest remainder (Hamilton's method)."""
    exact = [share * count for share in shares]
    whole = [int(value + 1e-9) for value in exact]
    order = sorted(range(len(shares)), key=lambda i: (whole[i] - exact[i], i))
    for i in order[: count - sum(whole)]:
        whole[i] += 1
    return whole
