"""Jobs in one training pass; where that fails, one by one, each within the memory that there is."""

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
    """One kind of training.

    ``rows_in_pass`` is of the clients that ran out of memory in it; ``told``: that a cohort did,
    whose clients fit one by one, which takes longer in every round and is told once.
    """

    rows_in_pass: dict[str, int] = field(default_factory=dict)
    told: bool = False

    def train(
        self, jobs: Sequence[TrainJob], settings: TrainSettings, attempt: Attempt
    ) -> list[TrainResult]:
        """Results of jobs that may share a pass; a job that fails takes no other with it."""
        short = any(job.client_id in self.rows_in_pass for job in jobs)
        too_large = False
        if len(jobs) > 1 and not short:
            # Alone, each tells whether it was the cause; the others lose only time.
            try:
                return attempt(jobs, settings.model_copy(update={"micro_batch_size": 0}))
            except Exception as error:
                too_large = is_out_of_memory(error)
            # Outside the block above: the error's frames hold the pass that was too large.
            free_memory()
        results = [self._alone(job, settings, attempt) for job in jobs]
        return self._telling(results) if too_large else results

    def _telling(self, results: list[TrainResult]) -> list[TrainResult]:
        """The first result with a note that the cohort was too large, unless a client was it."""
        if self.told or any(result.cause or result.note for result in results):
            return results
        self.told = True
        note = (
            f"out of memory with {len(results)} clients in a pass: trained one by one, which takes "
            "longer in every round; lower engine.cohort-size"
        )
        return [replace(results[0], note=note), *results[1:]]

    def _alone(self, job: TrainJob, settings: TrainSettings, attempt: Attempt) -> TrainResult:
        def within(rows: int) -> TrainResult:
            return attempt([job], settings.model_copy(update={"micro_batch_size": rows}))[0]

        first = self.rows_in_pass.get(job.client_id, settings.rows_per_pass)
        try:
            result, rows = train_within_memory(within, job, first)
        except Exception as error:
            return failed_training(job, one_line(error))
        if rows < first:
            self.rows_in_pass[job.client_id] = rows  # not to run out again in every round
        return result


def failed_training(job: TrainJob, cause: str) -> TrainResult:
    """A result without factors: who, what it was to start from, and why there is nothing."""
    return TrainResult(
        client_id=job.client_id,
        rank_class=job.start.rank_class.name,
        base_round=job.start.base_round,
        digest=job.start.digest,
        cause=cause,
    )
