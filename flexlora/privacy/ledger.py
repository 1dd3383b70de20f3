"""The rounds of a run that added noise: what they have spent, in the run's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flexlora.privacy.accounting import Mechanism, epsilon_of

__all__ = ["Ledger"]


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Mechanisms in the order of their rounds, equal ones in a row counted.

    A round counts once its noise is drawn, whether or not its result was used.
    """

    delta: float
    rounds: tuple[tuple[Mechanism, int], ...] = ()

    @property
    def epsilon(self) -> float:
        """What has been spent."""
        return epsilon_of(self.rounds, self.delta)

    @property
    def num_rounds(self) -> int:
        return sum(count for _, count in self.rounds)

    def after(self, mechanism: Mechanism, count: int = 1) -> Ledger:
        """The ledger with one round more, or ``count``."""
        rounds = self.rounds
        if rounds and rounds[-1][0] == mechanism:
            rounds = (*rounds[:-1], (mechanism, rounds[-1][1] + count))
        else:
            rounds = (*rounds, (mechanism, count))
        return Ledger(delta=self.delta, rounds=rounds)

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint's JSON."""
        rounds = [{**asdict(mechanism), "rounds": count} for mechanism, count in self.rounds]
        return {"delta": self.delta, "rounds": rounds}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Ledger:
        rounds = []
        for row in values["rounds"]:
            fields = {name: value for name, value in row.items() if name != "rounds"}
            rounds.append((Mechanism(**fields), row["rounds"]))
        return Ledger(delta=values["delta"], rounds=tuple(rounds))
