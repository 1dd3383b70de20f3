"""``flexlora reproduce cohort-speed``: trainings a second beside Flower on Ray and PEFT loops.

The measurement is ``benchmarks/cohort.py``, once per seed; the verdict is on the mean over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec

from flexlora.errors import UserError
from flexlora.simulations.experiments.asked import Asked, scaled
from flexlora.simulations.experiments.verdicts import Check, tell

__all__ = ["cohort_speed", "speed_checks"]

CLIENTS, ROUNDS = 16, 6
FEWEST_CLIENTS, FEWEST_ROUNDS = 4, 3  # a client of each rank, a round after those of the warm-up
FLAGS = {
    "clients.count": "--clients",
    "num-server-rounds": "--rounds",
    "model.name": "--model",
    "data.path": "--data",
    "method.name": "--method",
    "train.max-steps": "--steps",
    "train.per-device-train-batch-size": "--batch-size",
    "train.max-length": "--max-length",
}
NEEDED = {"ray": "flexlora[ray]", "peft": "peft"}


def cohort_speed(asked: Asked) -> int:
    """The benchmark for every seed that is not kept yet, and its verdict.

    Raises:
        UserError: a key that the benchmark does not read, or a package that its peers need.
    """
    words, kept = _words(asked), asked.kept()
    from flexlora.simulations.benchmarks import cohort

    for seed in asked.seeds:
        if not kept.of_seeds([seed]):
            rows = cohort.main([*words, "--seed", str(seed)])
            kept.add_all(seed, {row.name: asdict(row) for row in rows})
    asked.console.print(f"Numbers: {kept.file}", soft_wrap=True)
    return tell(speed_checks(kept.of_seeds(asked.seeds)), asked.console, scale=asked.scale)


def _words(asked: Asked) -> list[str]:
    """The benchmark's command line."""
    if odd := sorted(set(asked.given) - set(FLAGS)):
        known = ", ".join(sorted(FLAGS))
        raise UserError(f"{odd[0]} is not read by '{asked.name}', expected some of {known}.")
    for package, name in NEEDED.items():
        if find_spec(package) is None:
            raise UserError(
                f"'{asked.name}' runs Flower on Ray and PEFT beside ours and finds no {package}; "
                f"run pip install '{name}'."
            )
    values = {
        "clients.count": scaled(CLIENTS, asked.scale, least=FEWEST_CLIENTS),
        "num-server-rounds": scaled(ROUNDS, asked.scale, least=FEWEST_ROUNDS),
        **asked.given,
    }
    return [word for key, value in values.items() for word in (FLAGS[key], str(value))]


def speed_checks(rows: Sequence[Mapping]) -> list[Check]:
    """Every ratio that has a target; and that all trained the same, at any size."""
    checks = []
    for name in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == name]
        if target := own[0]["target"]:
            sense = "at most" if own[0]["at_most"] else "at least"
            seen = statistics.fmean(row["ratio"] for row in own)
            checks.append(Check(claim=name, expected=target, seen=seen, sense=sense))
    held = [row for row in rows if row["allowed_error"]]
    return [
        *checks,
        Check(
            claim="the losses of round 1 of any other program differ from ours by",
            expected=0.0,
            seen=max((row["error"] for row in held), default=float("nan")),
            tolerance=min((row["allowed_error"] for row in held), default=0.0),
            any_scale=True,
        ),
    ]
