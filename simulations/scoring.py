"""Scores of adapters over the held-out rows of all clients of a worker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flexlora.clients.worker import Worker
from flexlora.errors import UserError
from flexlora.evaluation.evaluate import BASE
from flexlora.lora.adapters import Adapter
from flexlora.training.personal_store import PersonalStore
from flexlora.wire.jobs import PERSONAL, EvalJob, EvalResult, Score

__all__ = ["OWN_CLASS", "Cell", "cells_of", "held_out_scores", "total"]

OWN_CLASS = "own class"  # each client under the adapter of the client's rank class


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The scores of one client's rows of one task, by adapter.

    ``trained_client`` and ``trained_task``: whether the adapters were trained with this client,
    and with this task at any client.
    """

    client_id: str
    category: str
    task: str
    trained_client: bool
    trained_task: bool
    scores: Mapping[str, Score]

    @property
    def group(self) -> str:
        """Which of the four kinds of rows these are."""
        client = "seen" if self.trained_client else "unseen"
        return f"{client} clients, {'seen' if self.trained_task else 'unseen'} tasks"


def held_out_scores(worker: Worker, adapters: Mapping[str, Adapter]) -> dict[str, Score]:
    """Loss and generation scores by adapter name; without adapters the base's, named ``base``.

    Raises:
        UserError: an adapter that does not fit the base, or no rows to score on.
    """
    results = _results(worker, adapters, generate=True)
    return {
        name: total(r.scores[name] for r in results if name in r.scores)
        for name in adapters or (BASE,)
    }


def total(scores: Iterable[Score]) -> Score:
    """The sum of scores."""
    return sum(scores, Score())


def cells_of(
    worker: Worker,
    adapters: Mapping[str, Adapter],
    *,
    classes: Mapping[str, str],
    trained: frozenset[str] | None = None,
    personal: PersonalStore | None = None,
    server_round: int = 0,
) -> list[Cell]:
    """Scores under the base and every adapter, and under personal factors where there are some.

    ``classes`` has the rank class of clients; with more than one in use, ``own class`` are the
    scores of each client at the client's class. ``trained`` are the clients that the adapters were
    trained with (None: all that have train rows), and ``personal`` the factors of clients up to
    ``server_round``.

    Raises:
        UserError: as ``held_out_scores``.
    """
    generate = worker.config.eval.generate != "never"
    base = {result.client_id: result for result in _results(worker, {}, generate=generate)}
    if trained is None:
        trained = frozenset(c for c in base if worker.data.examples(c, "train"))
    tasks = {
        (row.category or "", row.task or "")
        for client_id in trained & set(worker.client_ids)
        for row in worker.data.examples(client_id, "train")
    }
    cells = []
    for result in _results(
        worker, adapters, generate=generate, personal=personal, server_round=server_round
    ):
        for (category, task), of_base in base[result.client_id].by_task.items():
            scores = {**of_base, **result.by_task[category, task]}
            own, with_personal = classes.get(result.client_id, ""), scores.pop(PERSONAL, None)
            if own in scores and len(adapters) > 1:
                scores[OWN_CLASS] = scores[own]
            if with_personal is not None:
                scores[PERSONAL] = with_personal
            cells.append(
                Cell(
                    client_id=result.client_id,
                    category=category,
                    task=task,
                    trained_client=result.client_id in trained,
                    trained_task=(category, task) in tasks,
                    scores=scores,
                )
            )
    return cells


def _results(
    worker: Worker,
    adapters: Mapping[str, Adapter],
    *,
    generate: bool,
    personal: PersonalStore | None = None,
    server_round: int = 0,
) -> Sequence[EvalResult]:
    jobs = [
        EvalJob(
            client_id=client_id,
            server_round=server_round,
            adapters=adapters,
            generate=generate,
            held_out_tasks=True,
        )
        for client_id in worker.client_ids
    ]
    if personal is not None:
        jobs = personal.attach_eval(jobs)
    results = worker.evaluate(jobs)
    for result in results:
        if result.cause:
            cause = result.cause.removeprefix("ValueError: ")
            raise UserError(f"the adapter does not fit the base: {cause}")
    if not any(score.rows for result in results for score in result.scores.values()):
        split = worker.config.eval.split
        raise UserError(f"the data has no {split} rows that fit; try another eval.split.")
    return results
