"""Central differential privacy of one run: its clipping and noise, its ledger, its end.

    before the first ``check_budget`` refuses a run whose budget allows no further round
    in the round     ``gaussian_sum`` clips the changes and adds noise to their sum
    after it         ``spend`` enters the round in the ledger, which the checkpoint holds

Sampling and noise must be unknown to whoever sees the result, and every client knows the run's
seed. So sampling is drawn from a secret of the run, which the operating system gives and the
checkpoint keeps, and the noise of each round from another, which is not stored. With
``privacy.reproducible`` both are functions of the run's seed: for simulations that are repeated.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from flexlora.aggregation.engine.gaussian_sum import GaussianSum
from flexlora.aggregation.engine.sums import Sums
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.privacy.accounting import Mechanism
from flexlora.privacy.ledger import Ledger
from flexlora.seeds import derive_seed

__all__ = ["CentralPrivacy"]

SECRET_BITS = 63  # of a torch generator's seed
UNKNOWN = 1 << 62


class CentralPrivacy:
    """``privacy.mode=central`` over the rounds of a run; does nothing under ``none``.

    ``last_round`` is the last that the budget allows, once it is known.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.keys = config, config.privacy
        self.active = self.keys.mode == "central"
        self.ledger = Ledger(delta=self.keys.delta)
        self.last_round = UNKNOWN
        hidden = self.active and not self.keys.reproducible
        self.sampling_seed = secrets.randbits(SECRET_BITS) if hidden else config.seed
        self._why = ""

    def mechanism(self, num_clients: int) -> Mechanism:
        """A round in which ``num_clients`` are registered."""
        return Mechanism(
            num_clients=num_clients,
            sample_share=self.config.fraction_train,
            noise_multiplier=self.keys.noise_multiplier,
            cap=min(self.config.sampling.cap, num_clients),
        )

    def gaussian_sum(self, server_round: int, num_clients: int) -> GaussianSum | None:
        """For one round; the divisor is that of the run's first round, whoever joined since."""
        if not self.active:
            return None
        first = self.ledger.rounds[0][0].num_clients if self.ledger.rounds else num_clients
        seed = secrets.randbits(SECRET_BITS)
        if self.keys.reproducible:
            seed = derive_seed(self.config.seed, "privacy", server_round)
        return GaussianSum(
            clip=self.keys.clip,
            noise_multiplier=self.keys.noise_multiplier,
            expected_clients=self.config.fraction_train * first,
            seed=seed,
        )

    def spend(self, server_round: int, num_clients: int) -> None:
        """Enter a round whose noise was drawn; sets ``last_round`` where no other may follow."""
        if self.active:
            self.ledger = self.ledger.after(self.mechanism(num_clients))
            self._why = self._exhausted(num_clients)
            self.last_round = server_round if self._why else UNKNOWN

    def check_budget(self, num_clients: int) -> None:
        """
        Raises:
            UserError: one more round would exceed the budget.
        """
        if cause := self._exhausted(num_clients):
            raise UserError(
                f"{cause}. Another run needs a larger budget, more noise or fewer clients a round."
            )

    def _exhausted(self, num_clients: int) -> str:
        budget = self.keys.epsilon if self.active else 0.0
        if not budget:
            return ""
        after = self.ledger.after(self.mechanism(num_clients)).epsilon
        if after <= budget:
            return ""
        return (
            f"privacy.epsilon is {budget:g}, and epsilon {self.ledger.epsilon:.4g} is spent; one "
            f"more round would make it {after:.4g}"
        )

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Epsilon so far, and the share of the round's changes that were clipped."""
        if not self.active:
            return {}
        share = {"clipped_share": 1.0 - sums.unclipped / sums.counted} if sums.counted else {}
        return {"epsilon": self.ledger.epsilon, **share}

    def ending(self) -> dict[str, str]:
        """Why the last round was the last that the budget allows; empty where it was not."""
        return {"budget_spent": self._why} if self._why else {}

    def to_dict(self) -> dict[str, Any]:
        """For the notes of a checkpoint."""
        return {"ledger": self.ledger.to_dict(), "sampling_seed": self.sampling_seed}

    def restore(self, values: Mapping[str, Any]) -> None:
        if values:
            self.ledger = Ledger.from_dict(values["ledger"])
            self.sampling_seed = values["sampling_seed"]
