"""The memory of a simulation with many clients, round by round: it must not grow.

    python -m flexlora.simulations.benchmarks.cohort_flat CONFIG OUT

prints the peak of its resident set after every round, in megabytes, as JSON. The peak is ``VmHWM``:
``ru_maxrss`` is inherited from the process that starts this one, and a large parent hides all
growth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.server.observing.observer import Observer
from flexlora.simulations.benchmarks.cohort_rows import CohortRow
from flexlora.simulations.benchmarks.cohort_work import Size
from flexlora.simulations.simulate import simulate
from flexlora.training.models import resolve_name

__all__ = ["flat_rows"]

FIRST_ROUND = 2  # by then every kind of pass has been made once
TARGET = 1.1


class Peaks(Observer):
    """The peak after each round."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        if metrics["round"]:
            self.megabytes.append(peak_megabytes())


def peak_megabytes() -> float:
    """The largest resident set of this process so far (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1000.0
    raise RuntimeError("/proc/self/status has no VmHWM, expected a Linux kernel that counts it.")


def flat_rows(size: Size, population: int) -> list[CohortRow]:
    """The peak after the last round over that after round 2, in a process of its own."""
    if size.rounds <= FIRST_ROUND:
        raise UserError(f"--rounds is {size.rounds}, expected more than {FIRST_ROUND}; raise it.")
    with tempfile.TemporaryDirectory(prefix="flat") as folder:
        config = Path(folder) / "flat.toml"
        config.write_text(tomli_w.dumps(_config(size, population).nested()), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(config), str(Path(folder) / "run")]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"the run failed:\n{done.stderr[-4000:]}")
    peaks = json.loads(done.stdout.splitlines()[-1])
    print("peak after each round, MB:", ", ".join(f"{peak:.0f}" for peak in peaks))
    return [
        CohortRow(
            name=f"peak after round {size.rounds} over round {FIRST_ROUND}, {population} clients",
            ratio=peaks[-1] / peaks[FIRST_ROUND - 1],
            target=TARGET,
            at_most=True,
            ours=peaks[-1],
            other=peaks[FIRST_ROUND - 1],
            unit="MB",
        )
    ]


def _config(size: Size, population: int) -> Config:
    """A share of the population in each round, as many as ``size.clients``; evaluation as usual."""
    data = {"data.path": size.data, "data.partition": "iid"} if size.data else {}
    return Config.of(
        {
            "seed": size.seed,
            "num-server-rounds": size.rounds,
            "fraction-train": size.clients / population,
            "clients.count": population,
            "method.name": size.method,
            "ranks.tiers": ",".join(str(rank) for rank in size.ranks),
            "ranks.shares": "equal",
            "model.name": resolve_name(size.model),
            "train.per-device-train-batch-size": size.batch_size,
            "train.max-steps": size.steps,
            "train.max-length": size.max_length,
            "eval.fraction": size.clients / population,
            "eval.generate": "never",
            **data,
        }
    )


if __name__ == "__main__":
    observer = Peaks()
    simulate(Config.resolve(file=sys.argv[1]), sys.argv[2], observer=observer)
    print(json.dumps(observer.megabytes))
