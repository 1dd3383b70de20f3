"""``flexlora reproduce rates``: eval loss by round at server rate 1, 2 and the round's own.

The settings go from one client to 80, with rows dealt at random (IID) or by task. All three rates
see the same clients, rows and steps; rounds and steps are fewer where a round is dear.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from flexlora.simulations.experiments.request import ROUNDS, Request, scaled
from flexlora.simulations.experiments.variant_table import run_variants
from flexlora.simulations.experiments.variants import Variant

__all__ = ["RATES", "SETTINGS", "Setting", "course_table", "rate_variants", "server_rates"]

MEASURED = {"eval.every": 1, "eval.generate": "never"}
RATES = {"rate 1": 1.0, "rate 2": 2.0, "the round's own": 0.0}
IID = {"data.partition": "iid", "fraction-train": 1.0}
BY_TASK = {"fraction-train": 1.0}
LEAST_ROUNDS = 2

Scores = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One federation: clients (0: all 24 of the data), rounds, rows scored per client."""

    clients: int
    rounds: int
    rows: int
    changes: Mapping[str, object] = field(default_factory=dict)

    def changes_at(self, scale: float) -> dict[str, object]:
        """The keys of this federation; ``scale`` is a factor on its rounds."""
        return {
            "clients.count": self.clients,
            "eval.max-examples": self.rows,
            ROUNDS: scaled(self.rounds, scale, least=LEAST_ROUNDS),
            **self.changes,
        }


SETTINGS = {
    "1 client, IID": Setting(clients=1, rounds=8, rows=192, changes=IID),
    "2 clients, IID": Setting(clients=2, rounds=8, rows=96, changes=IID),
    "8 clients, IID": Setting(clients=8, rounds=8, rows=24, changes=IID),
    "80 clients, IID, 10 steps": Setting(
        clients=80, rounds=2, rows=3, changes={**IID, "train.max-steps": 10}
    ),
    "2 clients by task": Setting(clients=2, rounds=8, rows=96, changes=BY_TASK),
    "8 clients by task": Setting(clients=8, rounds=8, rows=24, changes=BY_TASK),
    "24 clients by task, 8 a round": Setting(clients=0, rounds=8, rows=8),
    "80 clients by task, 27 a round": Setting(clients=80, rounds=4, rows=3),
    "24 clients by task, 8 a round, aligned": Setting(
        clients=0, rounds=8, rows=8, changes={"method.name": "aligned"}
    ),
    "24 clients by task, 8 a round, residual": Setting(
        clients=0, rounds=8, rows=8, changes={"method.name": "residual"}
    ),
}


def rate_variants(scale: float = 1.0) -> tuple[Variant, ...]:
    """Every setting at every rate."""
    return tuple(
        Variant(
            title=f"{rate}, {title}",
            kind="course",
            part=title,
            changes={**setting.changes_at(scale), "method.server-learning-rate": value},
        )
        for title, setting in SETTINGS.items()
        for rate, value in RATES.items()
    )


def server_rates(request: Request) -> int:
    """Run the variants and print a table per setting."""
    variants = rate_variants(request.scale)
    results = run_variants(request, variants, MEASURED)
    rows = results.of_seeds(request.seeds)
    for part in SETTINGS:
        request.console.print()
        request.console.print(course_table(part, variants, rows))
    request.console.print(f"Numbers: {results.file}", soft_wrap=True)
    return 0


def course_table(part: str, variants: Sequence[Variant], rows: Sequence[Scores]) -> Table:
    """Eval loss by round, the mean over seeds, a row per rate; below, the rates of the rule."""
    titles = [variant.title for variant in variants if variant.part == part]
    of_part = [row for row in rows if row["variant"] in titles]
    table = Table(title=part, title_justify="left", box=None, pad_edge=False)
    table.add_column("round", no_wrap=True)
    rounds = sorted({entry["round"] for row in of_part for entry in row["rounds"]})
    for server_round in rounds:
        table.add_column(str(server_round), justify="right", no_wrap=True)
    for title in titles:
        runs = [row for row in of_part if row["variant"] == title]
        label = title.removesuffix(f", {part}")
        table.add_row(label, *(_mean(runs, "loss", r, 3) for r in rounds))
    own = [row for row in of_part if row["variant"].startswith("the round's own")]
    table.add_row("  which was", *(_mean(own, "rate", r, 1) for r in rounds))
    return table


def _mean(rows: Sequence[Scores], key: str, server_round: int, digits: int) -> str:
    values = [
        entry[key]
        for row in rows
        for entry in row["rounds"]
        if entry["round"] == server_round and entry.get(key) is not None
    ]
    return f"{statistics.fmean(values):.{digits}f}" if values else ""
