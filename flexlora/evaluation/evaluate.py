"""Held-out loss, choices by likelihood, and scores of generated answers.

Many adapters are evaluated in one pass as slots: shared adapters on the same rows, personal ones
each on its client's rows. A score does not depend on the other slots, up to the rounding of wider
matrix products. Text scores compare a greedy generation from
the prompt alone with the reference, never the teacher-forced argmax, which sees the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from flexlora.data.collation import Example
from flexlora.errors import UserError
from flexlora.evaluation.cohorts import EvalPlan, carried_adapter
from flexlora.evaluation.generation import generate_answers
from flexlora.evaluation.likelihood import answer_token_losses, likelihood_score
from flexlora.evaluation.text_scores import exact_match, passes_pattern, rouge_l
from flexlora.training.models import BaseModel
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import PERSONAL, EvalJob, EvalResult, Score

__all__ = ["BASE", "PERSONAL", "evaluate"]

BASE = "base"  # the name of the scores of the base model alone


def evaluate(
    slots: SlotModel,
    base: BaseModel,
    jobs: Sequence[EvalJob],
    examples: Sequence[Sequence[Example]],
    *,
    batch_size: int,
    max_new_tokens: int,
    interrupt: Callable[[], str] | None = None,
) -> list[EvalResult]:
    """Scores of every job's adapters on its rows ``examples[k]``, in the order of the jobs.

    Jobs with equal adapters share passes; personal factors (``EvalJob.personal``) run in cohorts.
    ``interrupt`` is asked before every pass and every generated token; a reason ends all of it.

    Raises:
        UserError: ``interrupt`` gave a reason.
        ValueError: an adapter that does not fit the model, or personal factors over an adapter
            that the job does not have.
    """
    plan = EvalPlan(jobs=jobs, examples=examples)
    scorer = _Scorer(
        slots=slots,
        base=base,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        interrupt=interrupt,
    )
    totals = [_Totals() for _ in jobs]
    try:
        for members in plan.groups():
            rows = [row for k in members for row in examples[k]]
            owners = [k for k in members for _ in examples[k]]
            for name, row_scores in scorer.shared(jobs[members[0]], rows).items():
                for k, row, score in zip(owners, rows, row_scores, strict=True):
                    totals[k].add(name, row, score)
        for members in plan.cohorts(batch_size):
            cohort = scorer.personal([jobs[k] for k in members], [examples[k] for k in members])
            for k, row_scores in zip(members, cohort, strict=True):
                for row, score in zip(examples[k], row_scores, strict=True):
                    totals[k].add(PERSONAL, row, score)
    finally:
        slots.clear()
    return [
        EvalResult(client_id=job.client_id, scores=total.scores, by_task=total.by_task)
        for job, total in zip(jobs, totals, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Totals:
    """Sums of the scores of one job's rows by adapter: over all rows, and by category and task."""

    scores: dict[str, Score] = field(default_factory=dict)
    by_task: dict[tuple[str, str], dict[str, Score]] = field(default_factory=dict)

    def add(self, name: str, row: Example, score: Score) -> None:
        of_task = self.by_task.setdefault((row.category or "", row.task or ""), {})
        for sums in (self.scores, of_task):
            sums[name] = sums.get(name, Score()) + score


@dataclass(frozen=True, kw_only=True)
class _Scorer:
    """Loads adapters into ``slots`` and scores rows under them."""

    slots: SlotModel
    base: BaseModel
    batch_size: int
    max_new_tokens: int
    interrupt: Callable[[], str] | None = None

    def shared(self, job: EvalJob, rows: Sequence[Example]) -> dict[str, list[Score]]:
        """Scores of each row by name: under each of the job's adapters, or under the bare base."""
        # Rank classes with equal adapters are scored once.
        digests = {name: adapter.digest() for name, adapter in job.adapters.items()}
        distinct = {digest: job.adapters[name] for name, digest in digests.items()}
        self.slots.load(list(distinct.values())) if distinct else self.slots.clear()
        per_slot = self._scores([rows] * max(len(distinct), 1), job.generate)
        by_digest = dict(zip(distinct or [BASE], per_slot, strict=True))
        return {name: by_digest[digest] for name, digest in (digests or {BASE: BASE}).items()}

    def personal(
        self, jobs: Sequence[EvalJob], examples: Sequence[Sequence[Example]]
    ) -> list[list[Score]]:
        """Scores of each job's rows under its personal factors plus the carried adapter.

        The jobs are a cohort of ``EvalPlan.cohorts``: they carry equal adapters.
        """
        adapters = [job.personal for job in jobs if job.personal is not None]
        carried = carried_adapter(jobs[0])
        self.slots.load(adapters, carried=None if carried is None else [carried] * len(adapters))
        return self._scores(examples, jobs[0].generate)

    def _go_on(self) -> None:
        why = self.interrupt() if self.interrupt is not None else ""
        if why:
            raise UserError(f"the evaluation is ended: {why}")

    def _scores(self, examples: Sequence[Sequence[Example]], generate: bool) -> list[list[Score]]:
        """``[K][rows]`` scores of the rows ``examples[k]`` under slot k."""
        pad = self.base.pad_token_id
        variants = [[x for row in rows for x in row.choices or (row,)] for rows in examples]
        losses = answer_token_losses(
            self.slots,
            variants,
            batch_size=self.batch_size,
            pad_token_id=pad,
            go_on=self._go_on,
        )
        scores = []
        for rows, of_slot in zip(examples, losses, strict=True):
            found = iter(of_slot)
            scores.append(
                [
                    likelihood_score(row, [next(found) for _ in row.choices or (row,)])
                    for row in rows
                ]
            )
        if not generate:
            return scores
        texts = generate_answers(
            self.slots,
            examples,
            tokenizer=self.base.tokenizer,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            pad_token_id=pad,
            go_on=self._go_on if self.interrupt is not None else None,
        )
        return [
            [_with_text(*row) for row in zip(scores[k], rows, texts[k], strict=True)]
            for k, rows in enumerate(examples)
        ]


def _with_text(score: Score, row: Example, text: str) -> Score:
    matches, overlap = exact_match(text, row.answer), rouge_l(text, row.answer)
    score = replace(score, exact_match=matches, rouge_l=overlap, generated=1)
    if row.pattern is None:
        return score
    return replace(score, pattern_rows=1, passed=passes_pattern(text, row.pattern))
