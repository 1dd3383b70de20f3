"""Central differential privacy of one run: its clipping and noise, its ledger, its end.

    before the first ``check_start`` refuses a run whose budget allows no further round
    in the round     ``gaussian_sum`` clips the changes and adds noise to their sum
    after it         ``spend`` enters the round in the ledger, which the checkpoint holds, and moves
                     the clip norm where it follows a quantile

Sampling and noise must be unknown to whoever sees the result, and every client knows the run's
seed. So sampling is drawn from a secret of the run, which the operating system gives and the
checkpoint keeps, and the noise of each round from another, which is not stored. With
``privacy.reproducible`` both are functions of the run's seed: for simulations that are repeated.

With ``privacy.as-if-clients`` a simulated cohort of n clients stands for N: the mean of the changes
gets the noise that it would have with N, and epsilon is theirs. It protects nobody in the cohort.
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
from flexlora.privacy.adaptive_clip import AdaptiveClip
from flexlora.privacy.ledger import Ledger
from flexlora.seeds import derive_seed

__all__ = ["CentralPrivacy"]

SECRET_BITS = 63  # of a torch generator's seed
UNKNOWN = 1 << 62


class CentralPrivacy:
    """``privacy.mode=central`` over the rounds of a run; does nothing under ``none``.

    ``last_round`` is the last that the budget allows, once it is known. ``clip`` is the norm of the
    next round, and ``first_clients`` the number of clients in the run's first one.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.keys = config, config.privacy
        self.active = self.keys.mode == "central"
        self.ledger = Ledger(delta=self.keys.delta)
        self.last_round = UNKNOWN
        hidden = self.active and not self.keys.reproducible
        self.sampling_seed = secrets.randbits(SECRET_BITS) if hidden else config.seed
        self.clip, self.first_clients = self.keys.clip, 0
        self._of_clip: dict[str, float] = {}  # the metrics of the round
        self._seed = 0  # of the round's noise
        self._why = ""

    def mechanism(self, num_clients: int) -> Mechanism:
        """A round in which ``num_clients`` are registered; where all are asked, not amplified."""
        everybody = self.config.fraction_train == 1.0 and not self.config.sampling.cap
        return Mechanism(
            num_clients=self.keys.as_if_clients or num_clients,
            sample_share=self.config.fraction_train,
            noise_multiplier=self.keys.noise_multiplier,
            sampling="none" if everybody else "poisson",
            cap=min(self.config.sampling.cap, num_clients),
        )

    def gaussian_sum(self, server_round: int, num_clients: int) -> GaussianSum | None:
        """For one round; the divisor is that of the run's first round, whoever joined since."""
        if not self.active:
            return None
        self.first_clients = self.first_clients or num_clients
        self._of_clip = {}
        self._seed = secrets.randbits(SECRET_BITS)
        if self.keys.reproducible:
            self._seed = derive_seed(self.config.seed, "privacy", server_round)
        adaptive, multiplier = self._adaptive(), self.keys.noise_multiplier
        if adaptive is not None:
            multiplier = adaptive.sum_multiplier
        return GaussianSum(
            clip=self.clip,
            noise_multiplier=multiplier / self._clients_for_one,
            expected_clients=self.config.fraction_train * self.first_clients,
            seed=self._seed,
        )

    @property
    def _clients_for_one(self) -> float:
        """``N / n``: how many clients of the stated population one of this run stands for."""
        return (self.keys.as_if_clients or self.first_clients) / self.first_clients

    def _adaptive(self) -> AdaptiveClip | None:
        if not self.keys.clip_quantile:
            return None
        population = self.keys.as_if_clients or self.first_clients
        return AdaptiveClip(
            quantile=self.keys.clip_quantile,
            noise_multiplier=self.keys.noise_multiplier,
            expected_clients=self.config.fraction_train * population,
        )

    def spend(self, server_round: int, num_clients: int, sums: Sums) -> None:
        """Enter a round whose noise was drawn, and adapt the clip norm of the next one.

        Sets ``last_round`` where no other may follow.
        """
        if not self.active:
            return
        self.ledger = self.ledger.after(self.mechanism(num_clients))
        self._why = self._exhausted(num_clients)
        self.last_round = server_round if self._why else UNKNOWN
        self._of_clip = {"clip": self.clip}
        adaptive, each = self._adaptive(), self._clients_for_one
        if adaptive is not None:
            share = adaptive.share(each * sums.unclipped, each * sums.counted, self._seed)
            self._of_clip["clipped_share"] = 1.0 - min(1.0, max(0.0, share))
            self.clip = adaptive.next_clip(self.clip, share)
        elif sums.counted:
            self._of_clip["clipped_share"] = 1.0 - sums.unclipped / sums.counted

    def check_start(self, num_clients: int, *, measured: bool) -> None:
        """
        Raises:
            UserError: one more round would exceed the budget, or ``privacy.as-if-clients`` is given
                for real nodes (``measured``) or for fewer clients than there are.
        """
        if cause := self._exhausted(num_clients):
            raise UserError(
                f"{cause}. Another run needs a larger budget, more noise or fewer clients a round."
            )
        stated = self.keys.as_if_clients
        if stated and measured:
            raise UserError(
                f"privacy.as-if-clients is {stated} in a run over nodes, whose clients would get "
                "less noise than their epsilon needs; it is for `flexlora simulate` alone."
            )
        if 0 < stated < num_clients:
            raise UserError(
                f"privacy.as-if-clients is {stated} and {num_clients} clients take part, expected "
                "at least as many: a cohort can only stand for a larger one."
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

    def metrics(self) -> dict[str, float]:
        """Epsilon so far and of how many clients, the round's clip norm, the share clipped.

        Where the clip follows a quantile, the share is the noised one that epsilon covers.
        """
        if not self.active:
            return {}
        stated = self.keys.as_if_clients
        of_whom = {"as_if_clients": stated} if stated else {}
        return {"epsilon": self.ledger.epsilon, **of_whom, **self._of_clip}

    def ending(self) -> dict[str, str]:
        """Why the last round was the last that the budget allows; empty where it was not."""
        return {"budget_spent": self._why} if self._why else {}

    def to_dict(self) -> dict[str, Any]:
        """For the notes of a checkpoint."""
        return {
            "ledger": self.ledger.to_dict(),
            "sampling_seed": self.sampling_seed,
            "clip": self.clip,
            "first_clients": self.first_clients,
        }

    def restore(self, values: Mapping[str, Any]) -> None:
        if values:
            self.ledger = Ledger.from_dict(values["ledger"])
            self.sampling_seed = values["sampling_seed"]
            self.clip, self.first_clients = values["clip"], values["first_clients"]
