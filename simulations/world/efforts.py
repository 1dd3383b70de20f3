"""The work of a train message, computed before the training: passes, tokens, bytes.

    passes    one for every part of a step; one more for every part of a batch whose gradient turns
              ``lora_A`` at the start; those of own factors
    bytes up  the factors that get gradients, of the terms that this client draws

What HetLoRA's clients prune is known when they have trained: their bytes are those of all terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flexlora.clients.worker import Worker
from flexlora.data.collation import Example
from flexlora.simulations.world.clock import Effort, OwnTraining
from flexlora.training.personal import PersonalPlan
from flexlora.training.schedule import TrainSettings, num_steps, planned_rows
from flexlora.wire.encoding import encoded_bytes
from flexlora.wire.jobs import TrainJob

__all__ = ["effort_of"]


def effort_of(job: TrainJob, worker: Worker, *, wire_dtype: str, bytes_down: int) -> Effort:
    """The effort of one job; a client without rows has only its transfers."""
    rows, local = worker.train_rows(job), job.start.local
    own_start = job.start.for_client(job.client_id)
    return Effort(
        client_id=job.client_id,
        server_round=job.server_round,
        rank_class=job.start.rank_class,
        quantization=worker.quantization_of(job.client_id),
        tokens=_tokens(job, rows, worker.settings) if rows else 0,
        steps=num_steps(len(rows), worker.settings) if rows else 0,
        bytes_down=bytes_down,
        bytes_up=encoded_bytes(own_start.trained, wire_dtype, own_start.trainable),
        looks=local.gradient_batches if rows else 0,
        own=_own(job, rows, worker.personal, worker.settings),
    )


def _tokens(job: TrainJob, rows: Sequence[Example], settings: TrainSettings) -> int:
    """Padded tokens of all steps, and of the batches whose gradient turns ``lora_A``."""
    steps, batches = num_steps(len(rows), settings), job.start.local.gradient_batches
    plan = planned_rows(job, len(rows), settings, ahead=batches)
    return _padded([*plan[:steps], *plan[:batches]], rows, settings.rows_per_pass)


def _own(
    job: TrainJob,
    rows: Sequence[Example],
    personal: PersonalPlan | None,
    settings: TrainSettings,
) -> OwnTraining | None:
    """The second training, of factors that stay with the client."""
    if personal is None or not rows:
        return None
    own = personal.settings(settings)
    plan = planned_rows(job, len(rows), own)
    return OwnTraining(
        rank=personal.rank,
        tokens=_padded(plan, rows, own.rows_per_pass),
        steps=len(plan),
    )


def _padded(plan: Iterable[Sequence[int]], rows: Sequence[Example], size: int) -> int:
    """Tokens that a device alone puts through the model: each pass as wide as its longest row."""
    total = 0
    for chosen in plan:
        for at in range(0, len(chosen), size):
            lengths = [len(rows[i].input_ids) for i in chosen[at : at + size]]
            total += len(lengths) * max(lengths)
    return total
