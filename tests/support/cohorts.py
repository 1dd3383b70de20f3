"""Three unequal clients and the recipe of each: what tests of local training compare slots on."""

from __future__ import annotations

import reference
from builders import random_adapter, random_examples, train_job
from flexlora.data.collation import batch_plan
from flexlora.training.local import TrainSettings, learning_rate_at, num_steps

EPOCHS = TrainSettings(
    learning_rate=0.02, per_device_train_batch_size=2, max_steps=0, num_train_epochs=2, seed=3
)


def settings(**changes):
    return TrainSettings(**{**dict(EPOCHS), **changes})


def cohort(slots, *, carried=False, **start):
    """Three jobs at ranks 2, 5 and 3, of other alphas, with 5, 9 and 2 rows."""
    jobs = [
        train_job(
            random_adapter(slots.shapes, rank, alpha=alpha, rslora=rank == 3, seed=rank),
            f"client_{rank}",
            carried=random_adapter(slots.shapes, 4 + k, seed=90 + k) if carried and k else None,
            server_round=2,
            **start,
        )
        for k, (rank, alpha) in enumerate([(2, 4.0), (5, 8.0), (3, 1.5)])
    ]
    return jobs, [random_examples(n, seed=n) for n in (5, 9, 2)]


def recipe(job, rows, chosen):
    """The same batches and rates as plain lists."""
    steps = num_steps(len(rows), chosen)
    return reference.Recipe(
        learning_rates=[learning_rate_at(chosen, job, step, steps) for step in range(steps)],
        batches=batch_plan(
            len(rows),
            batch_size=chosen.examples_per_step,
            steps=steps,
            seed_parts=(chosen.seed, "batches", job.server_round, job.client_id),
        ),
        max_grad_norm=chosen.max_grad_norm,
        weight_decay=chosen.weight_decay,
        adam_epsilon=chosen.adam_epsilon,
        optim=chosen.optim,
    )
