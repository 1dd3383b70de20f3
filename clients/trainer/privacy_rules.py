"""Hold trainings to a privacy budget: the owner's over all runs, and the run's own.

    owner's epsilon           of all rows together: every upload must carry noise (local)
    owner's example-epsilon   of any one row: uploads with noise on them, or on rows' gradients
    run's privacy.epsilon     of the run's rounds in which this node took part

Whoever sends jobs knows the run's seed, so ``privacy.reproducible`` is refused: its noise would be
none to them. The ledger is written before a reply leaves. The scores of held-out rows are no part
of this; ``eval.max-examples = 0`` keeps them here.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexlora.clients.trainer.limits import PrivacyLimits
from flexlora.clients.trainer.privacy_ledger import PrivacyLedger, Spent
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.privacy.client_rounds import (
    CLIENT_MODES,
    client_epsilon,
    client_round,
    over_budget,
)
from flexlora.privacy.ledger import Ledger
from flexlora.privacy.local_checks import check_client_privacy

__all__ = ["PrivacyRules"]

OWNERS = {"privacy.epsilon": ("local",), "privacy.example-epsilon": CLIENT_MODES}


class PrivacyRules:
    """The owner's privacy limits, and what has been spent."""

    def __init__(self, limits: PrivacyLimits, ledger: PrivacyLedger) -> None:
        self.limits, self.ledger = limits, ledger

    def refuse_mode(self, config: Config) -> None:
        """Refuse a run whose noise is not of the kind that the owner asks for.

        Raises:
            UserError: names the key, and what the owner allows.
        """
        mode = config.privacy.mode
        for key, modes in OWNERS.items():
            if self._budget(key) and mode not in modes:
                raise UserError(
                    f"privacy.mode is {mode}, and this node's owner allows "
                    f"{' or '.join(modes)} only ({key})."
                )
        if mode not in CLIENT_MODES:
            return
        check_client_privacy(config)
        if config.privacy.reproducible:
            raise UserError(
                f"privacy.reproducible is true with privacy.mode={mode}: noise from the run's seed "
                "hides nothing from those who know it; it is for simulations."
            )

    def refuse_round(self, config: Config, run: str, num_rows: int) -> None:
        """Refuse a training that would exceed a budget.

        Raises:
            UserError: names the budget, what is spent and what one more round would make it.
        """
        self.refuse_mode(config)
        if config.privacy.mode not in CLIENT_MODES:
            return
        mechanism, count = client_round(config, num_rows)
        for key, modes in OWNERS.items():
            ledger = self._ledger(self.ledger.spent(), modes, self.limits.delta)
            if budget := self._budget(key):
                over = over_budget(ledger, mechanism, count, budget)
                _refuse(over, f"this node's owner allows an epsilon of {budget:g} ({key}), and")
        if budget := config.privacy.epsilon:
            modes = (config.privacy.mode,)
            ledger = self._ledger(self.ledger.spent(run), modes, config.privacy.delta)
            over = over_budget(ledger, mechanism, count, budget)
            _refuse(over, f"privacy.epsilon is {budget:g}, and of this client")

    def spend(self, config: Config, run: str, num_rows: int) -> None:
        """Enter a round whose reply is about to leave.

        Raises:
            OSError: it cannot be written, so the reply must not leave.
        """
        if config.privacy.mode in CLIENT_MODES:
            mechanism, count = client_round(config, num_rows)
            whole = config.privacy.mode == "local"
            self.ledger.add(run, Spent(mechanism=mechanism, count=count, whole=whole))

    def quotas(self) -> list[tuple[str, float, float]]:
        """The owner's budgets: key, spent, allowed."""
        found = []
        for key, modes in OWNERS.items():
            if budget := self._budget(key):
                ledger = self._ledger(self.ledger.spent(), modes, self.limits.delta)
                found.append((key, client_epsilon(ledger.rounds, ledger.delta), budget))
        return found

    def _budget(self, key: str) -> float:
        return self.limits.epsilon if key == "privacy.epsilon" else self.limits.example_epsilon

    @staticmethod
    def _ledger(spent: Sequence[Spent], modes: Sequence[str], delta: float) -> Ledger:
        """The entries that count; those under ``local`` cover each single row too."""
        counted = [s for s in spent if s.whole or "example" in modes]
        return Ledger(delta=delta, rounds=tuple((s.mechanism, s.count) for s in counted))


def _refuse(over: str, whose: str) -> None:
    if over:
        raise UserError(f"{whose} {over}.")
