"""The sum of a round under central differential privacy: clipped changes, plus Gaussian noise.

    D_k = s_k B_k A_k - start_k            the full-size change,  [out, in] a module
    D_k = L_k = s_k B_k - s B_start        the linear form,       [out, R] (``linear_update.py``)
    change = (sum_k min(1, C / |D_k|) D_k + N(0, (z C)^2)) / (q N)

``|D_k|`` is over all modules together, so one client moves the sum by at most C in the Euclidean
norm of the numbers that get noise. In the linear form these are the columns: what they are then
multiplied with, ``A``, is public, and the statement holds whether or not its rows are orthonormal
(over a 16-bit wire they are to 0.4 %). R is the largest rank that is sent, since the ranks of those
who came would show in a narrower noise.

All clients count alike, and the divisor is the expected number of clients, a constant: the number
that came is itself private (McMahan et al. 2018, arXiv 1710.06963). A round to which no client came
is noise, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora.algebra.decompose import LazySums, MatrixSum
from flexlora.seeds import generator

__all__ = ["GaussianSum"]


@dataclass(frozen=True, kw_only=True)
class GaussianSum:
    """How a round's changes are clipped, divided and hidden.

    Args:
        clip: C, the largest norm of a change.
        noise_multiplier: z, the standard deviation of the noise on the sum over C.
        expected_clients: q N, the divisor.
        seed: of the round's noise; each module draws its matrix from it, the same at each access.
    """

    clip: float
    noise_multiplier: float
    expected_clients: float
    seed: int

    @property
    def deviation(self) -> float:
        """The standard deviation of the noise on one number of the mean change."""
        return self.noise_multiplier * self.clip / self.expected_clients

    def factor(self, energy: float) -> float:
        """``min(1, C / |D|)`` for a change of squared norm ``energy``."""
        norm = math.sqrt(energy)
        return 1.0 if norm <= self.clip else self.clip / norm

    def divided(self, means: Mapping[str, MatrixSum], total: float) -> LazySums:
        """Means over the factors, whose sum is ``total``, divided by the constant instead."""
        share = total / self.expected_clients
        return LazySums(means, lambda name: means[name].scaled(share))

    def noisy(self, changes: Mapping[str, MatrixSum], dtype: torch.dtype) -> LazySums:
        """The changes with the noise: one full-size matrix, of the module that is accessed."""

        def plus_noise(name: str) -> MatrixSum:
            change = changes[name]
            noise = self.noise(name, change.shape, dtype).to(change.device)
            dense = noise if change.dense is None else noise.add_(change.dense)
            return replace(change, dense=dense)

        return LazySums(changes, plus_noise)

    def noisy_columns(self, name: str, total: Tensor, A: Tensor) -> MatrixSum:
        """``(total / (q N) + noise) A`` of a linear sum; ``total [out, R]``, ``A [R, in]``."""
        out_features, rank = total.shape
        noise = self.noise(name, (out_features, rank), total.dtype).to(total.device)
        columns = noise.add_(total, alpha=1.0 / self.expected_clients)
        return MatrixSum(shape=(out_features, A.shape[1]), terms=((1.0, columns, A),))

    def noise(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """``N(0, deviation^2)``, ``shape``, on the CPU."""
        numbers = torch.randn(shape, generator=generator(self.seed, "noise", name), dtype=dtype)
        return numbers.mul_(self.deviation)
