"""Scores of adapters over the held-out rows of all clients of a worker."""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.clients.worker import Worker
from flexlora.errors import UserError
from flexlora.evaluation.evaluate import BASE
from flexlora.lora.adapters import Adapter
from flexlora.wire.jobs import EvalJob, Score

__all__ = ["held_out_scores"]


def held_out_scores(worker: Worker, adapters: Mapping[str, Adapter]) -> dict[str, Score]:
    """Loss and generation scores by adapter name; without adapters the base's, named ``base``.

    Raises:
        UserError: an adapter that does not fit the base, or no rows to score on.
    """
    totals = dict.fromkeys(adapters or (BASE,), Score())
    jobs = [
        EvalJob(client_id=client_id, server_round=0, adapters=adapters, generate=True)
        for client_id in worker.client_ids
    ]
    for result in worker.evaluate(jobs):
        if result.cause:
            cause = result.cause.removeprefix("ValueError: ")
            raise UserError(f"the adapter does not fit the base: {cause}")
        for name, score in result.scores.items():
            totals[name] += score
    if not all(score.rows and score.generated for score in totals.values()):
        split = worker.config.eval.split
        raise UserError(f"the data has no {split} rows that fit; try another eval.split.")
    return totals
