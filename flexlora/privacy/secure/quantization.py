"""Vectors of bounded norm as whole numbers whose sums over clients never wrap.

With n clients at most and numbers modulo ``2^bits``, each client has ``levels = 2 h`` steps:

    unit = RANGE * C / sqrt(d) / h,    q = round(x / unit) + h,    0 <= q <= 2 h,    n 2 h < 2^bits
    sum of x = (sum of q - clients * h) * unit

so a sum of q is exact, and the only error is each client's own rounding. ``bits`` grow with the
clients until ``MOST_BITS``: as long as they do, one client's rounding is ``RANGE / 2^11`` of the
deviation of its entries, as fine as bfloat16's.

Rounding is stochastic, up with the probability of the fraction: the mean is right for entries far
below a unit too, which a client of few examples has among clients of many, and which the nearest
number would turn into zeros. ``within`` keeps the norm of what is sent at C or below to the last
bit, as differential privacy counts on it.

Scalars that are summed beside the vector (``Digits``) are whole numbers in digits of base ``2 h +
1``, each summed like an entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["MOST_BITS", "Digits", "Grid", "shrunk", "within"]

RANGE = 5.5  # deviations: of normal entries 4 in 100 million are beyond
LEVEL_BITS = 11  # of one client, as long as the bits allow
MOST_BITS = 18  # 1.125 times a 16-bit number
LEAST_HALF = 4
AT_ONCE = 2**16  # numbers that stay in the cache
DEVIATIONS = 4.0  # of what rounding adds: beyond is once in some 30,000 vectors


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The numbers of one vector of ``dimension`` and norm at most ``clip``, of ``clients`` at most.

    Raises:
        ValueError: more clients than the bits have levels for.
    """

    dimension: int
    clients: int
    clip: float

    def __post_init__(self) -> None:
        if self.half < LEAST_HALF:
            most = (2**MOST_BITS - 1) // (2 * LEAST_HALF)
            raise ValueError(f"{self.clients:,} clients in one sum, expected at most {most:,}")

    @property
    def bits(self) -> int:
        """Of a number on the wire: sums are modulo ``2^bits``."""
        return min(MOST_BITS, LEVEL_BITS + (self.clients - 1).bit_length())

    @property
    def half(self) -> int:
        """h: the number of a zero, and half of the largest."""
        return (2**self.bits - 1) // self.clients // 2

    @property
    def unit(self) -> float:
        """What one step is worth."""
        return RANGE * self.clip / math.sqrt(self.dimension) / self.half

    def rounded(self, entries: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """``q - h`` of every entry, int32, at random up or down; clipped to the range."""
        found = np.empty(len(entries), dtype=np.int32)
        for at in range(0, len(entries), AT_ONCE):
            part = entries[at : at + AT_ONCE]
            steps = np.divide(part, self.unit, dtype=np.float32)
            steps += generator.random(len(part), dtype=np.float32)
            np.floor(steps, out=steps)
            found[at : at + AT_ONCE] = np.clip(steps, -self.half, self.half, out=steps)
        return found

    def towards_zero(self, entries: np.ndarray) -> np.ndarray:
        """``q - h`` whose norm is at most that of the entries."""
        steps = np.trunc(entries.astype(np.float64) / self.unit)
        return np.clip(steps, -self.half, self.half).astype(np.int32)

    def numbers(self, steps: np.ndarray) -> np.ndarray:
        """q, uint32, of ``q - h``."""
        return (steps + np.int32(self.half)).view(np.uint32)

    def sum_of(self, total: np.ndarray, clients: int) -> np.ndarray:
        """The sum of the entries, float64, of the sum of the ``numbers`` of so many clients."""
        steps = total.astype(np.int64) - clients * self.half
        return steps * self.unit


def shrunk(grids: Sequence[Grid], clip: float) -> float:
    """The norm to which a vector is clipped so that rounding rarely takes it above ``clip``.

    Rounding adds at most ``unit^2 / 4`` to the square of an entry in the mean, and the deviation of
    all that it adds is at most ``clip * unit``.
    """
    added = sum(grid.dimension * grid.unit**2 / 4 for grid in grids)
    spread = DEVIATIONS * clip * max(grid.unit for grid in grids)
    return math.sqrt(max(0.25 * clip**2, clip**2 - added - spread))


def squares(steps: np.ndarray) -> float:
    """The sum of their squares, exact below 2^53."""
    total = 0.0
    for at in range(0, len(steps), AT_ONCE):
        part = steps[at : at + AT_ONCE].astype(np.float64)
        total += float(np.dot(part, part))
    return total


def within(
    grids: Sequence[Grid],
    parts: Sequence[np.ndarray],
    generator: np.random.Generator,
    clip: float,
) -> list[np.ndarray]:
    """``rounded`` of every part, or ``towards_zero`` where the norm of all would exceed ``clip``.

    The parts have together a norm of ``shrunk(grids, clip)`` at most, so that this is rare, and
    none of the two results exceeds ``clip``.
    """
    steps = [grid.rounded(part, generator) for grid, part in zip(grids, parts, strict=True)]
    energy = sum(grid.unit**2 * squares(step) for grid, step in zip(grids, steps, strict=True))
    if energy <= clip**2:
        return steps
    return [grid.towards_zero(part) for grid, part in zip(grids, parts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Whole numbers from 0 to ``largest`` as digits below ``base``, so that their sums are exact.

    ``grid`` is that of the vector beside which they travel: its largest number is the largest
    digit.
    """

    base: int
    largest: int

    @staticmethod
    def of(grid: Grid, largest: int) -> Digits:
        return Digits(base=2 * grid.half + 1, largest=largest)

    @property
    def count(self) -> int:
        """Digits of one number."""
        count = 1
        while self.base**count <= self.largest:
            count += 1
        return count

    def numbers(self, value: int) -> np.ndarray:
        """The digits, uint32 ``[count]``, the lowest first.

        Raises:
            ValueError: a value out of its range.
        """
        if not 0 <= value <= self.largest:
            raise ValueError(f"{value}, expected 0 to {self.largest}")
        digits = [value // self.base**place % self.base for place in range(self.count)]
        return np.array(digits, dtype=np.uint32)

    def sum_of(self, total: np.ndarray) -> int:
        """The sum of the values, of the sums of their digits."""
        return sum(int(digit) * self.base**place for place, digit in enumerate(total))
