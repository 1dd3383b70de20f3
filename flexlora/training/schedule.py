"""The plan of local training: settings, number of steps, learning rates, rows of each step.

It depends on the configuration, the client and the round only, so a simulated clock and the cohort
planner can compute it before training.
"""

from __future__ import annotations

import math

from flexlora.config.sections import Train
from flexlora.data.collation import batch_plan
from flexlora.wire.jobs import TrainJob

__all__ = [
    "TrainSettings",
    "learning_rate_at",
    "num_steps",
    "planned_rows",
    "planned_rows_of",
    "sample_share",
]


class TrainSettings(Train):
    """The section ``train``, and the other keys that training reads.

    ``micro_batch_size`` is the most rows of a slot in one pass (0: the per-device batch size); a
    step's rows, and so its gradient, do not depend on it. With a ``row_clip`` training is DP-SGD
    (``row_privacy.py``): the norm to which a row's gradient is clipped, the noise's deviation over
    it, and whether rows and noise are drawn from ``seed``, which protects nobody who knows it.
    """

    seed: int = 0
    lora_dropout: float = 0.0
    micro_batch_size: int = 0
    row_clip: float = 0.0
    row_noise: float = 0.0
    reproducible: bool = False

    @property
    def rows_per_pass(self) -> int:
        return self.micro_batch_size or self.per_device_train_batch_size


def num_steps(num_examples: int, settings: TrainSettings) -> int:
    """Optimizer steps of one round for a client with that many examples."""
    if settings.max_steps > 0:
        return settings.max_steps
    return settings.num_train_epochs * math.ceil(num_examples / settings.examples_per_step)


def learning_rate_at(settings: TrainSettings, job: TrainJob, step: int, steps: int) -> float:
    """The rate of one step; the schedule runs once over all rounds that count."""
    counted = job.server_round - 1 - job.skipped_rounds
    progress = (counted + step / steps) / job.num_server_rounds
    factors = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return settings.learning_rate * factors[settings.lr_scheduler_type]


def sample_share(num_examples: int, settings: Train) -> float:
    """The probability with which a step of DP-SGD takes a row: ``min(1, batch / rows)``."""
    return min(1.0, settings.examples_per_step / num_examples)


def planned_rows(
    job: TrainJob, num_examples: int, settings: TrainSettings, *, ahead: int = 0
) -> list[list[int]]:
    """The rows of every step of one client's round, and of ``ahead`` steps after its last.

    DP-SGD draws other rows, in secret (``row_privacy.py``): as many in the mean, at most.
    """
    return planned_rows_of(job.client_id, job.server_round, num_examples, settings, ahead=ahead)


def planned_rows_of(
    client_id: str, server_round: int, num_examples: int, settings: TrainSettings, *, ahead: int = 0
) -> list[list[int]]:
    """``planned_rows`` of a client and a round, long after the job."""
    return batch_plan(
        num_examples,
        batch_size=settings.examples_per_step,
        steps=num_steps(num_examples, settings) + ahead,
        seed_parts=(settings.seed, "batches", server_round, client_id),
    )
