"""The request of one ``flexlora reproduce``: seeds, scale, output folder, configuration keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from flexlora.config.resolve import Config
from flexlora.data.clients import EMBEDDED_CLIENTS
from flexlora.errors import UserError
from flexlora.simulations.experiments.results import ResultsFile

__all__ = ["SEEDS", "Request", "scaled"]

SEEDS = 3
SMALLEST, LARGEST = 0.01, 10.0
CLIENTS, ROUNDS = "clients.count", "num-server-rounds"
# Below these a tier of a tenth of the clients would be empty, or there is no change over rounds.
FEWEST_CLIENTS, FEWEST_ROUNDS = 10, 2


def scaled(count: int, scale: float, *, least: int = 1) -> int:
    """``count`` times ``scale``, to the nearest whole number, and at least ``least``."""
    return max(least, math.floor(count * scale + 0.5))


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of ``flexlora reproduce``; the documented figures are those of ``scale`` 1.

    Raises:
        UserError: no seeds, or a scale that is not a number from 0.01 to 10.
    """

    name: str
    out: Path
    console: Console
    given: Mapping[str, object]
    num_seeds: int | None = None
    first_seed: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_seeds is not None and self.num_seeds < 1:
            raise UserError(f"--seeds is {self.num_seeds}, expected at least 1.")
        if self.first_seed < 0:
            raise UserError(f"--first-seed is {self.first_seed}, expected at least 0.")
        if not SMALLEST <= self.scale <= LARGEST:
            raise UserError(
                f"--scale is {self.scale:g}, expected a number from {SMALLEST:g} to {LARGEST:g}; "
                "1 is what is documented, 0.1 a tenth of its rounds, clients and seeds."
            )

    @property
    def seeds(self) -> list[int]:
        """The seeds of the table: ``num_seeds``, by default three times the scale."""
        count = self.num_seeds or scaled(SEEDS, self.scale)
        return list(range(self.first_seed, self.first_seed + count))

    def results(self) -> ResultsFile:
        """The results of earlier calls with the same request in ``out``."""
        return ResultsFile.read(
            self.out / "results.json", self.name, dict(self.given), scale=self.scale
        )

    def refuse_taken(self, taken: Sequence[str]) -> None:
        """Raises ``UserError`` for a ``--set`` of a key that the experiment sets."""
        if refused := sorted(set(taken) & set(self.given)):
            raise UserError(
                f"{refused[0]} is set by the experiment '{self.name}' itself; leave it out."
            )

    def sizes(
        self, *, rounds: int, clients: int = 0, least: int = FEWEST_CLIENTS
    ) -> dict[str, object]:
        """Rounds and clients at this scale; values given with ``--set`` are not scaled.

        ``clients``: the number at scale 1; 0 (unknown) leaves all clients of the data.
        """
        sizes: dict[str, object] = {ROUNDS: scaled(rounds, self.scale, least=FEWEST_ROUNDS)}
        if clients and self.scale != 1.0:
            sizes[CLIENTS] = scaled(clients, self.scale, least=least)
        return {key: value for key, value in sizes.items() if key not in self.given}

    def default_sizes(self) -> dict[str, object]:
        """The default federation at this scale; clients of the user's data are not scaled."""
        own_data = any(self.given.get(key) for key in ("data.path", "data.name"))
        rounds = Config().flat()[ROUNDS]
        return self.sizes(rounds=rounds, clients=0 if own_data else EMBEDDED_CLIENTS)
