"""Train jobs in one pass; if it does not fit, in halves, down to one client within the free memory.

What fitted is in the results: the engine plans its next cohorts by it (``CohortLimits.failed``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from flexlora.errors import one_line
from flexlora.training.out_of_memory import free_memory, is_out_of_memory, train_within_memory
from flexlora.training.schedule import TrainSettings
from flexlora.wire.jobs import TrainJob, TrainResult

__all__ = ["TrainPasses", "failed_training"]

Attempt = Callable[[Sequence[TrainJob], TrainSettings], list[TrainResult]]


@dataclass(kw_only=True)
class TrainPasses:
    """The memory limits learnt in one kind of training (global or personal factors).

    ``rows_in_pass`` holds the micro-batch of each client that ran out of memory by itself; such a
    client is trained alone from then on.
    """

    rows_in_pass: dict[str, int] = field(default_factory=dict)

    def train(
        self, jobs: Sequence[TrainJob], settings: TrainSettings, attempt: Attempt
    ) -> list[TrainResult]:
        """Results of jobs that may share a pass; a failed job fails no other."""
        short = [k for k, job in enumerate(jobs) if job.client_id in self.rows_in_pass]
        others = [k for k in range(len(jobs)) if k not in short]
        done = dict(
            zip(others, self._halved([jobs[k] for k in others], settings, attempt), strict=True)
        )
        done |= {k: self._alone(jobs[k], settings, attempt) for k in short}
        return [done[k] for k in range(len(jobs))]

    def _halved(
        self, jobs: Sequence[TrainJob], settings: TrainSettings, attempt: Attempt
    ) -> list[TrainResult]:
        """All in one pass, or each half so if that runs out of memory.

        After another error they are trained one by one, so that the job at fault fails alone.
        """
        if len(jobs) < 2:
            return [self._alone(job, settings, attempt) for job in jobs]
        try:
            return attempt(jobs, settings.model_copy(update={"micro_batch_size": 0}))
        except Exception as error:
            too_large = is_out_of_memory(error)
        # Outside the block above, where the error's frames hold the pass's tensors.
        free_memory()
        if not too_large:
            return [self._alone(job, settings, attempt) for job in jobs]
        half = (len(jobs) + 1) // 2
        results = [
            result
            for part in (jobs[:half], jobs[half:])
            for result in self._halved(part, settings, attempt)
        ]
        if any(result.cause or (result.note and not result.too_many) for result in results):
            return results  # one client is too large by itself: the others are not too many
        return [_too_many(result, len(jobs)) for result in results]

    def _alone(self, job: TrainJob, settings: TrainSettings, attempt: Attempt) -> TrainResult:
        def within(rows: int) -> TrainResult:
            return attempt([job], settings.model_copy(update={"micro_batch_size": rows}))[0]

        first = self.rows_in_pass.get(job.client_id, settings.rows_per_pass)
        try:
            result, rows = train_within_memory(within, job, first)
        except Exception as error:
            return failed_training(job, one_line(error))
        if rows < first:
            self.rows_in_pass[job.client_id] = rows  # next rounds start there
        return result


def _too_many(result: TrainResult, clients: int) -> TrainResult:
    """``result`` with the smallest number of clients of which a pass did not fit."""
    fewest = min(clients, result.too_many or clients)
    note = f"out of memory with {fewest} clients in a pass: trained fewer together"
    return replace(result, too_many=fewest, note=note)


def failed_training(job: TrainJob, cause: str) -> TrainResult:
    """A result without factors, with its start and the cause."""
    return TrainResult(
        client_id=job.client_id,
        rank_class=job.start.rank_class.name,
        base_round=job.start.base_round,
        digest=job.start.digest,
        cause=cause,
    )
