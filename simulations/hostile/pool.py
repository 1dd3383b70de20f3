"""A pool whose hostile clients send what an attack makes of the round, not what they trained.

It stands between the grid and the pool that trains, so an attack passes the wire, the checks and
the bounds as any update does. Attackers see the honest updates of their round, so these are trained
first and all held at once, as dense matrices where an attack asks for it: for small bases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flexlora.clients.worker import failed_training
from flexlora.config.resolve import Config
from flexlora.data.poisoning import Hostile, parse_hostile
from flexlora.server.robustness import robust_mean
from flexlora.simulations.engine.pool import Later, Pending, Pool
from flexlora.simulations.hostile.attacks import Change, Round, change_of, crafted, factors_of
from flexlora.wire.jobs import EvalJob, EvalResult, TrainJob, TrainResult

__all__ = ["HostilePool", "with_hostile"]

ROWS_ONLY = ("label-flip", "backdoor")  # trained as all are, on poisoned rows
Trained = list[tuple[TrainJob, TrainResult]]


def with_hostile(pool: Pool, config: Config, client_ids: Sequence[str]) -> Pool:
    """The pool with the hostile clients of ``population.hostile``; itself where there are none.

    Raises:
        UserError: an attack or a share that cannot be.
    """
    hostile = parse_hostile(config.population.hostile)
    return pool if hostile is None else HostilePool(pool, config, hostile, client_ids)


class HostilePool:
    """Trains as ``pool`` does, and replaces the results of the hostile clients."""

    def __init__(
        self, pool: Pool, config: Config, hostile: Hostile, client_ids: Sequence[str]
    ) -> None:
        self.pool, self.config, self.hostile = pool, config, hostile
        self.clients = hostile.clients(client_ids, config.seed)
        self._round = 0
        self._cohorts: list[tuple[Sequence[TrainJob], Pending[list[TrainResult]]]] = []

    def train(self, jobs: Sequence[TrainJob]) -> Pending[list[TrainResult]]:
        results = self.pool.train(jobs)
        if (server_round := jobs[0].server_round) != self._round:
            self._round, self._cohorts = server_round, []
        cohorts = self._cohorts  # later cohorts of this round join the same list
        cohorts.append((jobs, results))
        return Later(lambda: self._attacked(jobs, results.result(), cohorts))

    def evaluate(self, jobs: Sequence[EvalJob]) -> Pending[list[EvalResult]]:
        return self.pool.evaluate(jobs)

    def close(self) -> None:
        self.pool.close()

    def _attacked(
        self,
        jobs: Sequence[TrainJob],
        results: list[TrainResult],
        cohorts: Sequence[tuple[Sequence[TrainJob], Pending[list[TrainResult]]]],
    ) -> list[TrainResult]:
        if jobs[0].server_round > self.hostile.last_round:
            left = "it attacked in earlier rounds and has left"
            return [
                failed_training(job, left) if job.client_id in self.clients else result
                for job, result in zip(jobs, results, strict=True)
            ]
        if self.hostile.attack in ROWS_ONLY or not any(j.client_id in self.clients for j in jobs):
            return results
        known = self._known(
            [pair for js, rs in cohorts for pair in zip(js, rs.result(), strict=True)]
        )
        return [
            self._crafted(job, result, known)
            if job.client_id in self.clients and known is not None
            else result
            for job, result in zip(jobs, results, strict=True)
        ]

    def _known(self, trained: Trained) -> Round | None:
        """What the attackers know of their round; None where no honest client trained in it."""
        changes = {job.client_id: _change(job, result) for job, result in trained if result.adapter}
        honest = [change for name, change in changes.items() if name not in self.clients]
        if not honest:
            return None
        return Round(
            honest=honest,
            hostile=len(changes) - len(honest),
            robust=robust_mean(self.config, len(trained)),
            norm_ratio=self.config.server.max_norm_ratio,
        )

    def _crafted(self, job: TrainJob, result: TrainResult, known: Round) -> TrainResult:
        if result.adapter is None:
            return result
        change = crafted(self.hostile.attack, known, _change(job, result))
        start = job.start.for_client(job.client_id)
        return replace(result, adapter=factors_of(change, start))


def _change(job: TrainJob, result: TrainResult) -> Change:
    assert result.adapter is not None
    return change_of(result.adapter, job.start.for_client(job.client_id))
