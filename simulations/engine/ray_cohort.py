"""One cohort on its way through a Ray pool: its jobs, the deaths of workers, its results."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexlora.simulations.engine.ray_pool import RayPool

__all__ = ["TRIES", "TRIES_ALONE", "Cohort", "failed"]

TRIES = 3  # of one cohort; of one worker to load
TRIES_ALONE = 2  # of one client of such a cohort: the first death may be an accident


class Cohort:
    """Jobs of one pass on their way to a worker, and the results that have come back."""

    def __init__(self, kind: str, jobs: Sequence[Any], pool: RayPool) -> None:
        self.kind, self.jobs, self.pool = kind, list(jobs), pool
        self.results: list[Any] = []
        self.deaths = 0  # of workers that had these jobs
        self.wanted = False  # a call of result() waits for it
        self.answer: Future[list[Any]] = Future()

    def result(self) -> list[Any]:
        self.pool.train_here(self)
        return self.answer.result()

    @property
    def remaining(self) -> list[Any]:
        """The jobs to send next: all of them, or one after ``TRIES`` deaths."""
        return self.jobs if self.deaths < TRIES else [self.jobs[len(self.results)]]

    def died(self, how: str) -> None:
        """Count a death; a client that was alone in its last permitted try fails."""
        tried, single = self.remaining, len(self.jobs) == 1
        self.deaths += 1
        tries, allowed = (self.deaths, TRIES) if single else (self.deaths - TRIES, TRIES_ALONE)
        if len(tried) == 1 and tries == allowed:
            cause = f"the worker process died {tries} times with this client alone in it"
            remedy = "if memory ran out, lower train.per-device-train-batch-size or its rank"
            self.add([failed(tried[0], f"{cause} ({how}); {remedy}")])

    def add(self, results: Sequence[Any]) -> None:
        self.results += results
        if results:
            self.deaths = min(self.deaths, TRIES)  # the next client starts with all its tries


def failed(job: Any, cause: str) -> Any:
    """The failed result of a job, with its cause."""
    from flexlora.clients.worker import failed_training
    from flexlora.wire.jobs import EvalResult, TrainJob

    if isinstance(job, TrainJob):
        return failed_training(job, cause)
    return EvalResult(client_id=job.client_id, cause=cause)
