"""Train jobs in one pass; if it fails, one by one, each within the free memory."""

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

    ``rows_in_pass`` holds the micro-batch of each client that ran out of memory; ``reported`` is
    set when the note about a cohort that was too large has been sent once.
    """

    rows_in_pass: dict[str, int] = field(default_factory=dict)
    reported: bool = False

    def train(
        self, jobs: Sequence[TrainJob], settings: TrainSettings, attempt: Attempt
    ) -> list[TrainResult]:
        """Results of jobs that may share a pass; a failed job fails no other."""
        short = any(job.client_id in self.rows_in_pass for job in jobs)
        too_large = False
        if len(jobs) > 1 and not short:
            # One by one, the job at fault fails alone.
            try:
                return attempt(jobs, settings.model_copy(update={"micro_batch_size": 0}))
            except Exception as error:
                too_large = is_out_of_memory(error)
            # Outside the block above, where the error's frames hold the pass's tensors.
            free_memory()
        results = [self._alone(job, settings, attempt) for job in jobs]
        return self._with_note(results) if too_large else results

    def _with_note(self, results: list[TrainResult]) -> list[TrainResult]:
        """Note once, on the first result, that a cohort was too large whose clients all fit."""
        if self.reported or any(result.cause or result.note for result in results):
            return results
        self.reported = True
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
            self.rows_in_pass[job.client_id] = rows  # next rounds start there
        return result


def failed_training(job: TrainJob, cause: str) -> TrainResult:
    """A result without factors, with its start and the cause."""
    return TrainResult(
        client_id=job.client_id,
        rank_class=job.start.rank_class.name,
        base_round=job.start.base_round,
        digest=job.start.digest,
        cause=cause,
    )
