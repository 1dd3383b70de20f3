"""What the clients of a round send, before masks: the same function of public values on both sides.

    L_k [out, r_k] by module  ->  clip to C  ->  times w_k / w_max  ->  columns by band
    -> rotation of the band   ->  whole numbers (``quantization.py``)

and beside the numbers of the first band, which all clients have, the digits of

    examples   w_k
    loss       w_k times the mean training loss
    energy     w_k times the squared norm of what is summed
    clipped    1 where the norm was above C

so that the round has means although nobody's own value is known. Their sums are exact to the
rounding of each value, which ``SCALES`` gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flexlora.privacy.secure.bands import Band
from flexlora.privacy.secure.quantization import Digits, Grid, shrunk, within
from flexlora.privacy.secure.rotation import Rotation
from flexlora.seeds import derive_seed

__all__ = ["FIRST", "LARGEST_LOSS", "Opened", "Statistics", "SumPlan"]

FIRST = 0  # the band of all clients, whose numbers the scalars follow
LARGEST_LOSS = 100.0  # nats per token
SCALES = {"loss": 2**10, "energy": 2**20}  # steps of a nat, and of C^2


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """One client's numbers beside its update, or their sums over clients.

    ``loss`` and ``energy`` are times the weight; ``energy`` is of what is summed, after the clip.
    """

    examples: int
    loss: float
    energy: float
    clipped: int


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Sums over the clients: ``sum w_k L_k [out, R]`` by module, and the statistics."""

    matrices: Mapping[str, Tensor]
    statistics: Statistics


@dataclass(frozen=True, kw_only=True)
class SumPlan:
    """The public values of one round.

    Args:
        rows: out_features by module.
        bands: by number, those that are summed.
        sizes: the clients that each band has at most.
        seed: of the rotations.
        clip: C.
        largest: w_max.

    Raises:
        ValueError: too many clients for the bits.
    """

    rows: Mapping[str, int]
    bands: Mapping[int, Band]
    sizes: Mapping[int, int]
    seed: int
    clip: float
    largest: int

    @cached_property
    def grids(self) -> dict[int, Grid]:
        return {
            number: Grid(
                dimension=band.dimension(self.rows), clients=self.sizes[number], clip=self.clip
            )
            for number, band in self.bands.items()
        }

    @cached_property
    def scalars(self) -> dict[str, Digits]:
        """In the order in which they follow the first band's numbers."""
        most = {
            "examples": self.largest,
            "loss": math.ceil(self.largest * LARGEST_LOSS * SCALES["loss"]),
            "energy": 2 * self.largest * SCALES["energy"],
            "clipped": 1,
        }
        return {name: Digits.of(self.grids[FIRST], largest) for name, largest in most.items()}

    def length(self, number: int) -> int:
        """Numbers that a client of the band sends for it."""
        digits = sum(digits.count for digits in self.scalars.values()) if number == FIRST else 0
        return self.grids[number].dimension + digits

    def rotation(self, number: int) -> Rotation:
        return Rotation(derive_seed(self.seed, "band", number), self.grids[number].dimension)

    def numbers(
        self,
        matrices: Mapping[str, Tensor],
        *,
        weight: int,
        loss: float,
        generator: np.random.Generator,
        own: Mapping[int, Band] | None = None,
    ) -> dict[int, np.ndarray]:
        """The uint32 numbers of one client by band; ``own`` are the bands it has (default: all).

        Raises:
            ValueError: a weight or a loss out of its range, numbers that are not finite.
        """
        norms = [float(torch.linalg.vector_norm(m, dtype=torch.float64)) for m in matrices.values()]
        norm = math.hypot(*norms)
        if not (math.isfinite(norm) and 0.0 <= loss <= LARGEST_LOSS):
            raise ValueError(
                f"the update's norm is {norm:.3g} and its loss {loss:.3g}, expected finite numbers "
                f"and a loss of at most {LARGEST_LOSS:g}. Did training diverge?"
            )
        if not 1 <= weight <= self.largest:
            raise ValueError(f"{weight} examples, expected 1 to {self.largest} as announced.")
        chosen = self.bands if own is None else own
        grids = [self.grids[number] for number in chosen]
        bound = shrunk(grids, self.clip)
        factor = min(1.0, bound / norm) if norm else 1.0
        share = factor * weight / self.largest
        parts = [
            self.rotation(number).forward((share * band.vector(matrices)).float()).numpy()
            for number, band in chosen.items()
        ]
        steps = within(grids, parts, generator, self.clip)
        found = {
            number: grid.numbers(step)
            for number, grid, step in zip(chosen, grids, steps, strict=True)
        }
        statistics = Statistics(
            examples=weight,
            loss=weight * loss,
            energy=weight * (factor * norm) ** 2,
            clipped=int(norm > self.clip),
        )
        found[FIRST] = np.concatenate([found[FIRST], *self._digits(statistics)])
        return found

    def _digits(self, values: Statistics) -> list[np.ndarray]:
        whole = {
            "examples": values.examples,
            "loss": round(values.loss * SCALES["loss"]),
            "energy": round(values.energy / self.clip**2 * SCALES["energy"]),
            "clipped": values.clipped,
        }
        return [digits.numbers(whole[name]) for name, digits in self.scalars.items()]

    def opened(self, totals: Mapping[int, np.ndarray], clients: Mapping[int, int]) -> Opened:
        """The sums of ``numbers`` over so many clients by band; columns of other bands are 0."""
        widest = {
            name: max(
                (band.columns[name][1] for band in self.bands.values() if name in band.columns),
                default=0,
            )
            for name in self.rows
        }
        matrices = {
            name: torch.zeros(rows, widest[name], dtype=torch.float64)
            for name, rows in self.rows.items()
        }
        for number, total in totals.items():
            grid = self.grids[number]
            entries = grid.sum_of(total[: grid.dimension], clients[number])
            vector = self.rotation(number).inverse(torch.from_numpy(entries))
            self.bands[number].put(vector.mul_(self.largest), matrices)
        return Opened(matrices=matrices, statistics=self._statistics(totals[FIRST]))

    def _statistics(self, total: np.ndarray) -> Statistics:
        at, sums = self.grids[FIRST].dimension, {}
        for name, digits in self.scalars.items():
            sums[name] = digits.sum_of(total[at : at + digits.count])
            at += digits.count
        return Statistics(
            examples=sums["examples"],
            loss=sums["loss"] / SCALES["loss"],
            energy=sums["energy"] / SCALES["energy"] * self.clip**2,
            clipped=sums["clipped"],
        )
