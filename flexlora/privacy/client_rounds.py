"""What a client spends of its privacy when it takes part in a round.

    local     the client clips its change to C and adds noise of deviation z C to it. Any two data
              sets of the client move the clipped change by at most 2C, so an upload is a Gaussian
              mechanism of multiplier z / 2, whoever else takes part: nothing amplifies it. (Dwork
              and Roth 2014, theorem A.1; exactly, Balle and Wang 2018, arXiv 1805.06530, theorem 8)
    example   a round is as many Poisson-subsampled Gaussian mechanisms as it has steps, each with
              the share min(1, batch / rows). Neighbours blank one row, whose gradient then counts
              nothing (zero-out, Kairouz et al. 2021, arXiv 2103.00039): the number of rows is
              public, and the sum moves by at most C

Rounds compose adaptively: a client starts from what earlier uploads have made of the model. Each
client has spent what the rounds cost in which it took part itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexlora.config.resolve import Config
from flexlora.privacy.accounting import INTERVAL, Mechanism, Rounds, epsilon_of
from flexlora.privacy.ledger import Ledger
from flexlora.training.schedule import TrainSettings, num_steps, sample_share

__all__ = ["CLIENT_MODES", "ClientLedgers", "client_epsilon", "client_round", "over_budget"]

CLIENT_MODES = ("local", "example")  # in which the noise is the client's
COARSE = 10 * INTERVAL  # of losses: an upper bound too, for the many ledgers of a simulation


def client_round(config: Config, num_rows: int) -> tuple[Mechanism, int]:
    """The mechanism of a client with that many train rows, and how often a round applies it."""
    noise = config.privacy.noise_multiplier
    if config.privacy.mode == "local":
        return _gaussian(noise / 2), 1
    share = sample_share(num_rows, config.train)
    steps = num_steps(num_rows, TrainSettings(**dict(config.train)))
    if share == 1.0:
        return _gaussian(noise), steps
    mechanism = Mechanism(num_clients=num_rows, sample_share=share, noise_multiplier=noise)
    return mechanism, steps


def _gaussian(noise_multiplier: float) -> Mechanism:
    return Mechanism(
        num_clients=1, sample_share=1.0, noise_multiplier=noise_multiplier, sampling="none"
    )


def client_epsilon(rounds: Rounds, delta: float) -> float:
    """``epsilon_of`` for a client: closed form under ``local``, hundredths of a second else."""
    return epsilon_of(rounds, delta, COARSE)


def over_budget(spent: Ledger, mechanism: Mechanism, count: int, budget: float) -> str:
    """How much is spent, and what one more round would make it, where that exceeds ``budget``.

    Empty where it does not.
    """
    after = client_epsilon(spent.after(mechanism, count).rounds, spent.delta)
    if after <= budget:
        return ""
    before = client_epsilon(spent.rounds, spent.delta)
    return f"epsilon {before:.4g} is spent; one more round would make it {after:.4g}"


class ClientLedgers:
    """What the clients of one run have spent: for a simulation's clients, and for the server.

    A server knows which rounds a client took part in, how many rows it has, and the noise.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.active = config, config.privacy.mode in CLIENT_MODES
        self.by_client: dict[str, Ledger] = {}
        self._epsilons: dict[tuple, float] = {}

    def of(self, client_id: str) -> Ledger:
        return self.by_client.get(client_id, Ledger(delta=self.config.privacy.delta))

    def spend(self, client_id: str, num_rows: int) -> None:
        """Enter one round of a client."""
        if self.active:
            mechanism, count = client_round(self.config, num_rows)
            self.by_client[client_id] = self.of(client_id).after(mechanism, count)

    def refusal(self, client_id: str, num_rows: int) -> str:
        """Why the client takes no further part: its budget does not allow it. Empty if it does."""
        budget = self.config.privacy.epsilon
        if not (self.active and budget):
            return ""
        mechanism, count = client_round(self.config, num_rows)
        over = over_budget(self.of(client_id), mechanism, count, budget)
        return f"privacy.epsilon is {budget:g}, and of this client {over}" if over else ""

    def epsilons(self) -> dict[str, float]:
        """Epsilon by client, of those that took part."""
        return {client_id: self._epsilon(ledger) for client_id, ledger in self.by_client.items()}

    def _epsilon(self, ledger: Ledger) -> float:
        if ledger.rounds not in self._epsilons:
            self._epsilons[ledger.rounds] = client_epsilon(ledger.rounds, ledger.delta)
        return self._epsilons[ledger.rounds]

    def to_dict(self) -> dict[str, Any]:
        """For the notes of a checkpoint."""
        return {client_id: ledger.to_dict() for client_id, ledger in self.by_client.items()}

    def restore(self, values: Mapping[str, Any]) -> None:
        self.by_client = {k: Ledger.from_dict(ledger) for k, ledger in values.items()}
