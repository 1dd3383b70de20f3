"""A clip norm that follows a quantile of the clients' norms (Andrew et al. 2021, arXiv 1905.03871).

    b_k   = 1 where |D_k| <= C_t, else 0
    share = 1/2 + (sum_k (b_k - 1/2) + N(0, sigma_b^2)) / (q N)      share of unclipped clients
    C_t+1 = C_t exp(-0.2 (share - quantile))

A client moves ``sum_k (b_k - 1/2)`` by 1/2 and the sum of the clipped changes by C. Both together
are one Gaussian mechanism of multiplier z, which is what the ledger spends, if the noise on the
changes is a little larger (theorem 1):

    z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)

``sigma_b`` is the paper's ``q N / 20``, and at least 2 z, so that ``z_delta`` is at most 1.033 z:
in small cohorts the share is noisy, and it takes more rounds until the clip fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flexlora.seeds import generator

__all__ = ["AdaptiveClip"]

RATE = 0.2  # of the geometric update, in the paper's experiments
COUNT_SHARE = 1 / 20  # sigma_b over the expected clients
LEAST_COUNT_NOISE = 2.0  # sigma_b over the noise multiplier


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """The noise of both sums of a round, and the next clip norm.

    Args:
        quantile: of the clients' norms, which the clip follows.
        noise_multiplier: z, of both sums together.
        expected_clients: q N.
    """

    quantile: float
    noise_multiplier: float
    expected_clients: float

    @property
    def count_deviation(self) -> float:
        """``sigma_b``."""
        return max(COUNT_SHARE * self.expected_clients, LEAST_COUNT_NOISE * self.noise_multiplier)

    @property
    def sum_multiplier(self) -> float:
        """``z_delta``: the multiplier of the noise on the changes."""
        of_count = (2.0 * self.count_deviation) ** -2
        return (self.noise_multiplier**-2 - of_count) ** -0.5

    def share(self, unclipped: float, counted: float, seed: int) -> float:
        """The noised share of ``unclipped`` among ``counted`` clients; maybe below 0 or above 1."""
        noise = torch.randn((), generator=generator(seed, "count"), dtype=torch.float64)
        above_half = unclipped - counted / 2 + self.count_deviation * float(noise)
        return 0.5 + above_half / self.expected_clients

    def next_clip(self, clip: float, share: float) -> float:
        """``C_t+1``."""
        return clip * math.exp(-RATE * (share - self.quantile))
