"""Epsilon of a federation whose server adds Gaussian noise to the sum of its clients' changes.

A round adds the clipped changes of its sampled clients (norm at most C each) and noise of standard
deviation ``noise_multiplier * C``. Epsilon at a given delta depends on the way of sampling:

    poisson  each of N clients with probability q, independently; with a cap, a random subset of
             ``cap`` clients where more were drawn (truncated Poisson, arXiv 2508.15089)
    fixed    round(q N) clients without replacement (arXiv 1908.10530). Neighbours replace one
             client, so the sum changes by up to 2C: the noise multiplier counts half
    none     no amplification: whoever takes part may be known

``poisson`` and ``none`` protect whether a client takes part at all (neighbours add or remove one),
``fixed`` what a client that takes part contributes (neighbours replace one).

dp-accounting does the arithmetic: privacy loss distributions for ``poisson``, Renyi divergences for
``fixed`` (it has no other for it), the closed form of the Gaussian mechanism for ``none``. All are
upper bounds. Its Renyi accountant leaves the factor 2 of REPLACE_ONE to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from flexlora.errors import UserError

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

__all__ = ["SAMPLINGS", "Mechanism", "Rounds", "epsilon_of", "interval_for", "noise_for"]

SamplingName = Literal["poisson", "fixed", "none"]
SAMPLINGS: tuple[SamplingName, ...] = ("poisson", "fixed", "none")
Rounds = Sequence[tuple["Mechanism", int]]

INTERVAL = 1e-4  # of the privacy losses: dp-accounting's default
MOST_INTERVALS = 1e6  # up to the epsilon without amplification: memory and time stay bounded
LOWEST_NOISE, HIGHEST_NOISE = 1e-2, 1e5


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One round: how its clients are sampled, and the noise on their sum.

    Args:
        num_clients: N, the registered clients.
        sample_share: q, the share of them that a round trains on average.
        noise_multiplier: standard deviation of the noise over the clip norm.
        cap: most clients of a Poisson round; 0 for no cap.

    Raises:
        UserError: a value outside of its range, or a cap without Poisson sampling.
    """

    num_clients: int
    sample_share: float
    noise_multiplier: float
    sampling: SamplingName = "poisson"
    cap: int = 0

    def __post_init__(self) -> None:
        if self.num_clients < 1:
            raise UserError(f"{self.num_clients} clients, expected at least 1.")
        if not 0 < self.sample_share <= 1:
            raise UserError(
                f"the sampled share is {self.sample_share:g}, expected more than 0 and at most 1."
            )
        if not self.noise_multiplier >= LOWEST_NOISE:
            raise UserError(
                f"the noise multiplier is {self.noise_multiplier:g}, expected at least "
                f"{LOWEST_NOISE:g}: less protects nobody."
            )
        if self.cap and (self.sampling != "poisson" or not 1 <= self.cap <= self.num_clients):
            raise UserError(
                f"the cap is {self.cap} under {self.sampling} sampling of {self.num_clients} "
                "clients, expected Poisson sampling and 1 to all clients (0: no cap)."
            )

    @property
    def sample_size(self) -> int:
        """The clients of a round of fixed size."""
        return max(1, round(self.sample_share * self.num_clients))

    @property
    def replaces(self) -> bool:
        """Whether neighbours replace a client instead of adding or removing one."""
        return self.sampling == "fixed"


def epsilon_of(rounds: Rounds, delta: float, interval: float = INTERVAL) -> float:
    """Epsilon at ``delta`` of mechanisms, each with its number of rounds, composed.

    A few seconds for the first call with a truncated mechanism, tenths of a second otherwise.
    ``interval`` is that of the discretized privacy losses: the result is an upper bound at any,
    the closer the smaller it is beside epsilon (within 4e-4 at a thousandth of it).

    Raises:
        UserError: delta outside of (0, 1), or mechanisms whose neighbours differ.
    """
    if not 0 < delta < 1:
        raise UserError(f"delta is {delta:g}, expected more than 0 and less than 1.")
    rounds = [(mechanism, count) for mechanism, count in rounds if count > 0]
    if not rounds:
        return 0.0
    if len({mechanism.replaces for mechanism, _ in rounds}) > 1:
        raise UserError(
            "rounds of fixed size and others cannot be added up: the first hide which client took "
            "part, the others whether one did. Keep sampling.policy for the whole run."
        )
    if rounds[0][0].replaces:
        return _fixed_epsilon(rounds, delta)
    # Gaussian mechanisms on the same sum compose to one: their precisions add.
    precision = _precision([(m, count) for m, count in rounds if m.sampling == "none"])
    if all(mechanism.sampling == "none" for mechanism, _ in rounds):
        return _gaussian_epsilon(precision, delta)
    # Ten times as coarse for every power of ten beyond what memory and time allow.
    bound = _gaussian_epsilon(_precision(rounds), delta)
    coarser = max(0, math.ceil(math.log10(bound / (interval * MOST_INTERVALS))))
    losses = _loss_distribution(rounds, precision, interval * 10**coarser)
    return losses.get_epsilon_for_delta(delta)


def noise_for(
    budget: float,
    delta: float,
    num_rounds: int,
    *,
    num_clients: int,
    sample_share: float,
    sampling: SamplingName = "poisson",
    cap: int = 0,
) -> float:
    """The least noise multiplier whose epsilon is at most ``budget``, up to 1 in 1,000 above it.

    Raises:
        UserError: a budget that is not positive, or whose noise multiplier is out of all range.
    """
    from scipy.optimize import brentq

    if not 0 < budget < math.inf:
        raise UserError(f"the budget epsilon is {budget:g}, expected more than 0.")
    interval = interval_for(budget)

    def excess(log_noise: float) -> float:
        """The logarithm of epsilon over the budget: nearly linear, and falling."""
        mechanism = Mechanism(
            num_clients=num_clients,
            sample_share=sample_share,
            noise_multiplier=math.exp(log_noise),
            sampling=sampling,
            cap=cap,
        )
        epsilon = epsilon_of([(mechanism, num_rounds)], delta, interval)
        return math.log(max(epsilon, 1e-300) / budget)

    bracket = _bracket(excess)
    if bracket is None:
        raise UserError(
            f"no noise multiplier from {LOWEST_NOISE:g} to {HIGHEST_NOISE:g} has an epsilon of "
            f"{budget:g} at delta {delta:g} in {num_rounds} rounds of {sampling} sampling; change "
            "the budget or the rounds."
        )
    # Within 5e-4 of the root, and then above it.
    return math.exp(brentq(excess, *bracket, xtol=4e-4) + 5e-4)


def _bracket(excess: Callable[[float], float]) -> tuple[float, float] | None:
    """Two logarithms a factor of 4 apart with the root between them, searched from 0 outwards."""
    step = math.copysign(math.log(4), excess(0.0))
    low, high, here = math.log(LOWEST_NOISE), math.log(HIGHEST_NOISE), 0.0
    while low < here + step < high:
        if excess(here + step) * step <= 0:
            return min(here, here + step), max(here, here + step)
        here += step
    return None


def interval_for(epsilon: float) -> float:
    """The coarsest interval that changes an epsilon of this size by under 1 in 1,000."""
    return min(10 * INTERVAL, max(INTERVAL, epsilon / 1000))


def _precision(rounds: Rounds) -> float:
    """``sum of count / noise_multiplier^2``: the inverse variance of the composed Gaussians."""
    return sum(count / mechanism.noise_multiplier**2 for mechanism, count in rounds)


def _gaussian_epsilon(precision: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    from dp_accounting import get_epsilon_gaussian

    return get_epsilon_gaussian(1 / math.sqrt(precision), delta)


def _fixed_epsilon(rounds: Rounds, delta: float) -> float:
    from dp_accounting import (
        GaussianDpEvent,
        NeighboringRelation,
        SampledWithoutReplacementDpEvent,
    )
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    for mechanism, count in rounds:
        # Replacing a client moves the sum by up to 2C.
        gaussian = GaussianDpEvent(mechanism.noise_multiplier / 2)
        event = SampledWithoutReplacementDpEvent(
            mechanism.num_clients, mechanism.sample_size, gaussian
        )
        accountant.compose(event, count)
    return accountant.get_epsilon(delta)


def _loss_distribution(
    rounds: Rounds, precision: float, interval: float
) -> PrivacyLossDistribution:
    """The distribution of the privacy loss over all rounds, at equal intervals.

    ``precision`` is that of the rounds without amplification.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    whole = pld.identity(value_discretization_interval=interval)
    for mechanism, count in rounds:
        if mechanism.sampling == "poisson":
            whole = whole.compose(_one_round(mechanism, interval).self_compose(count))
    if precision:
        gaussians = pld.from_gaussian_mechanism(
            1 / math.sqrt(precision), value_discretization_interval=interval
        )
        whole = whole.compose(gaussians)
    return whole


@lru_cache(maxsize=4)
def _one_round(mechanism: Mechanism, interval: float) -> PrivacyLossDistribution:
    """Of one Poisson round; most of the time of a truncated one is spent here."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    # A cap of all clients never binds.
    if mechanism.cap and mechanism.cap < mechanism.num_clients:
        return pld.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=mechanism.num_clients,
            sampling_probability=mechanism.sample_share,
            truncated_batch_size=mechanism.cap,
            noise_multiplier=mechanism.noise_multiplier,
            value_discretization_interval=interval,
        )
    return pld.from_gaussian_mechanism(
        mechanism.noise_multiplier,
        sampling_prob=mechanism.sample_share,
        value_discretization_interval=interval,
    )
