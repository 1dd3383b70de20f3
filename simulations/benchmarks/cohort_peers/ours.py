"""The same clients and rounds through ``flexlora simulate``: aggregation, run folder and all.

    python -m flexlora.simulations.benchmarks.cohort_peers.ours FOLDER REPORT
        [--workers W] [--threads T]

More than the others do is in its time: the exact sum and an SVD per module, the loss of every
client before and after training, a checkpoint and a row on disk in every round.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from flexlora.config.resolve import Config
from flexlora.runs.outcomes import Outcome
from flexlora.server.members.roster import Roster
from flexlora.server.observing.observer import Observer
from flexlora.simulations.benchmarks.cohort_peers.work import Stamps, write_report
from flexlora.simulations.simulate import simulate


class Rounds(Observer):
    """When rounds ended, who worked, metrics."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.stamps = Stamps()
        self.rounds: list[Mapping[str, object]] = []
        self.processes = 0

    def met(self, roster: Roster) -> None:
        if roster.left_out:
            raise RuntimeError(f"clients were left out: {roster.left_out}")

    def replied(self, client_id: str, outcome: Outcome, cause: str, late: bool) -> None:
        if outcome is not Outcome.OK:
            raise RuntimeError(f"client {client_id} did not train: {cause}")

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        self.stamps.mark()
        self.rounds.append(metrics)
        if len(self.rounds) == 2:
            self.processes = 1 if self.workers == 1 else 1 + _actors()  # this one trains too


def _actors() -> int:
    """Ray's processes below this one that hold an actor; two of its own are called agents."""
    names = [process.name() for process in psutil.Process().children(recursive=True)]
    actors = [name for name in names if name.startswith("ray::") and "Agent" not in name]
    return sum(not name.startswith("ray::IDLE") for name in actors)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("report")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    engine = {"engine.workers": options.workers, "engine.threads": options.threads}
    config = Config.resolve(file=Path(options.folder) / "config.toml")
    observer, out = Rounds(options.workers), Path(options.report).with_suffix("")
    simulate(Config.of({**config.flat(), **engine}), out, observer=observer)
    with (out / "clients.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["round"] == "1"]
    write_report(
        options.report,
        observer.stamps,
        [],
        workers=options.workers,
        processes=observer.processes,
        trained=[metrics["clients_ok"] for metrics in observer.rounds[1:]],
        train_loss=observer.rounds[1]["train_loss"],
        loss_before={row["client_id"]: float(row["loss_before"]) for row in rows},
        loss_after={row["client_id"]: float(row["loss_after"]) for row in rows},
    )


if __name__ == "__main__":
    main()
