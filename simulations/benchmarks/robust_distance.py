"""How far each attack moves the result of each robust rule in one round, on real updates.

    python -m flexlora.simulations.benchmarks.robust_distance --rounds 3

Trains the federation of ``flexlora reproduce hostile`` without attackers and takes the updates of
its last round. Then two of the ten clients attack, on paper: the table has the distance of the
result from the honest mean over the norm of that mean, all modules together, mean and largest over
five pairs of attackers. ``nobody hostile`` is against the mean of all ten. An attack on rows is no
function of the updates and is not here.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flexlora.aggregation.engine.robust_rules import RULES, RobustMean
from flexlora.clients.worker import Worker, worker_for
from flexlora.config.resolve import Config, resolved
from flexlora.server.app import federate
from flexlora.simulations.engine.cohorts import resolved_limits
from flexlora.simulations.engine.pool import Later, LocalPool, Pending
from flexlora.simulations.experiments.hostile_clients import SETTING
from flexlora.simulations.hostile.attacks import Change, Round, change_of, crafted, factors_of
from flexlora.simulations.simulate import make_grid
from flexlora.wire.jobs import TrainJob, TrainResult

__all__ = ["Recorder", "distances"]

ATTACKS = ("sign-flip", "scaling", "alie", "inner-product", "mimic", "backdoor-boosted")
SEES_THE_RULE = ("alie", "inner-product")
HOSTILE = 2


class Recorder(LocalPool):
    """Keeps every client's last job and change."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.last: dict[str, tuple[TrainJob, Change]] = {}

    def train(self, jobs: Sequence[TrainJob]) -> Pending[list[TrainResult]]:
        trained = super().train(jobs)

        def recorded() -> list[TrainResult]:
            for job, result in zip(jobs, trained.result(), strict=True):
                if result.adapter is not None:
                    self.last[job.client_id] = job, change_of(result.adapter, job.start)
            return trained.result()

        return Later(recorded)


def recorded_round(rounds: int, seed: int) -> list[tuple[TrainJob, Change]]:
    """Jobs and changes of the last of so many rounds, in the order of the clients."""
    values = {**SETTING, "num-server-rounds": rounds, "seed": seed, "engine.threads": 1}
    config = resolved(Config.of({**values, "eval.generate": "never", "eval.max-examples": 1}))
    worker = worker_for(config)
    config, pool = resolved_limits(config, worker), Recorder(worker)
    with tempfile.TemporaryDirectory() as folder:
        federate(make_grid(config, worker, pool), config, Path(folder) / "run")
    return [pool.last[name] for name in sorted(pool.last)]


def distances(
    round_: Sequence[tuple[TrainJob, Change]], attack: str, rules: Sequence[str]
) -> dict[str, list[float]]:
    """By rule, of every pair of attackers; without an ``attack`` of the round as it was."""
    if not attack:
        rows = torch.stack([_flat(change) for _, change in round_])
        return {rule: [_moved(rows, rows, rule)] for rule in rules}
    found: dict[str, list[float]] = {rule: [] for rule in rules}
    for first in range(0, len(round_) - 1, HOSTILE):
        evil = round_[first : first + HOSTILE]
        honest = [change for _, change in (*round_[:first], *round_[first + HOSTILE :])]
        mean, sent = torch.stack([_flat(change) for change in honest]), None
        for rule in rules:
            if sent is None or attack in SEES_THE_RULE:
                sent = _sent(evil, honest, attack, rule)
            found[rule].append(_moved(torch.cat([sent, mean]), mean, rule))
    return found


def _sent(
    evil: Sequence[tuple[TrainJob, Change]], honest: Sequence[Change], attack: str, rule: str
) -> Tensor:
    robust = RobustMean(rule=rule, hostile=HOSTILE) if rule in RULES else None
    known = Round(honest=honest, hostile=HOSTILE, robust=robust, norm_ratio=50.0)
    adapters = [(factors_of(crafted(attack, known, own), job.start), job) for job, own in evil]
    return torch.stack([_flat(change_of(adapter, job.start)) for adapter, job in adapters])


def _moved(rows: Tensor, honest: Tensor, rule: str) -> float:
    mean = honest.mean(dim=0)
    c = torch.full_like(rows[:, 0], 1.0 / len(rows))
    if rule in RULES:
        c = RobustMean(rule=rule, hostile=HOSTILE).coefficients(rows @ rows.T)
    return float((c @ rows - mean).norm() / mean.norm())


def _flat(change: Change) -> Tensor:
    return torch.cat([change[name].flatten() for name in sorted(change)])


def main() -> None:
    parser = argparse.ArgumentParser(description="One round: attacks against robust rules.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    round_ = recorded_round(given.rounds, given.seed)
    rules = ("none", *RULES)
    print(f"| attack | {' | '.join(rules)} |")
    print(f"|---|{'---:|' * len(rules)}")
    for attack in ("", *ATTACKS):
        cells = []
        for found in distances(round_, attack, rules).values():
            worst = f" ({max(found):.2f})" if len(found) > 1 else ""
            cells.append(f"{statistics.fmean(found):.2f}{worst}")
        print(f"| {attack or 'nobody hostile'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
