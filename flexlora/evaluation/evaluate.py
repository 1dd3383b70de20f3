"""Held-out loss, and answers that the model really generates.

Adapters are evaluated in slots, many in one pass. Adapters that jobs share lie as slots over the
same rows; adapters of one client each lie as slots over that client's own rows, a cohort as in
training. A score is the same alone and in company, up to the rounding of wider matrix products.
Exact match and ROUGE-L compare a greedy generation that starts from the prompt alone with the
reference: never the teacher-forced argmax, which sees the reference while it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from flexlora.data.collation import Example, collate
from flexlora.evaluation.cohorts import Asked, below_of
from flexlora.evaluation.generation import generate_answers, own_answers, passes
from flexlora.training.local import answer_losses
from flexlora.training.models import BaseModel
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import PERSONAL, EvalJob, EvalResult, Score

__all__ = [
    "BASE",
    "PERSONAL",
    "answer_loss_sums",
    "evaluate",
    "exact_match",
    "generate_answers",
    "own_loss_sums",
    "rouge_l",
]

BASE = "base"  # the name under which the bare base is scored


def exact_match(generated: str, reference: str) -> float:
    """1.0 where the two are the same text up to surrounding and repeated white space."""
    return float(generated.split() == reference.split())


def rouge_l(generated: str, reference: str) -> float:
    """ROUGE-L F1 (Lin, 2004) as the ``rouge-score`` package computes it, without stemming."""
    return _scorer().score(reference, generated)["rougeL"].fmeasure


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def answer_loss_sums(
    slots: SlotModel, examples: Sequence[Example], *, batch_size: int, pad_token_id: int
) -> list[list[float]]:
    """Summed answer loss of each row under each loaded slot: ``[K][rows]``; K = 1 for the base."""
    same = [examples] * max(slots.num_slots, 1)
    return own_loss_sums(slots, same, batch_size=batch_size, pad_token_id=pad_token_id)


@torch.no_grad()
def own_loss_sums(
    slots: SlotModel,
    examples: Sequence[Sequence[Example]],
    *,
    batch_size: int,
    pad_token_id: int,
) -> list[list[float]]:
    """The same where slot k has rows of its own, ``examples[k]``."""
    sums = [[0.0] * len(rows) for rows in examples]
    lengths = [[len(row.input_ids) for row in rows] for rows in examples]
    for indices in passes(lengths, batch_size):
        rows = [[examples[k][i] for i in own] for k, own in enumerate(indices)]
        parts = answer_losses(slots, collate(rows, pad_token_id=pad_token_id))
        for k, part in enumerate(parts):
            counts = [_answer_tokens(row) for row in rows[k]]
            for i, losses in zip(indices[k], part.split(counts), strict=True):
                sums[k][i] = float(losses.double().sum())
    return sums


def _answer_tokens(row: Example) -> int:
    return len(row.input_ids) - row.prompt_length


def evaluate(
    slots: SlotModel,
    base: BaseModel,
    jobs: Sequence[EvalJob],
    examples: Sequence[Sequence[Example]],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[EvalResult]:
    """Scores of every job's adapters on its own rows; jobs that share adapters share passes.

    Adapters of a job's own (``EvalJob.personal``) go through in cohorts (``eval_cohorts.py``).

    Raises:
        ValueError: an adapter that does not fit the model, or personal factors over an adapter
            that the job does not have.
    """
    asked = Asked(jobs=jobs, examples=examples)
    passing = _Passing(slots=slots, base=base, batch_size=batch_size, new_tokens=max_new_tokens)
    scores: list[dict[str, Score]] = [{} for _ in jobs]
    try:
        for members in asked.groups():
            rows = [row for k in members for row in examples[k]]
            owners = [k for k in members for _ in examples[k]]
            for name, row_scores in passing.shared(jobs[members[0]], rows).items():
                for k, score in zip(owners, row_scores, strict=True):
                    scores[k][name] = scores[k].get(name, Score()) + score
        for members in asked.cohorts(batch_size):
            cohort = passing.own([jobs[k] for k in members], [examples[k] for k in members])
            for k, row_scores in zip(members, cohort, strict=True):
                scores[k][PERSONAL] = sum(row_scores, Score())
    finally:
        slots.clear()
    return [
        EvalResult(client_id=job.client_id, scores=score)
        for job, score in zip(jobs, scores, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Passing:
    """Rows through the model, and what is counted of them."""

    slots: SlotModel
    base: BaseModel
    batch_size: int
    new_tokens: int

    def shared(self, job: EvalJob, rows: Sequence[Example]) -> dict[str, list[Score]]:
        """Scores of each row by name: under each of the job's adapters, or under the bare base."""
        # Classes that are served the same adapter are scored once.
        named = {name: adapter.digest() for name, adapter in job.adapters.items()}
        distinct = {digest: job.adapters[name] for name, digest in named.items()}
        self.slots.load(list(distinct.values())) if distinct else self.slots.clear()
        per_slot = self._scores([rows] * max(len(distinct), 1), job.generate)
        by_digest = dict(zip(distinct or [BASE], per_slot, strict=True))
        return {name: by_digest[digest] for name, digest in (named or {BASE: BASE}).items()}

    def own(
        self, jobs: Sequence[EvalJob], examples: Sequence[Sequence[Example]]
    ) -> list[list[Score]]:
        """Scores of each job's rows under its own factors, over what they all lie over."""
        own = [job.personal for job in jobs if job.personal is not None]
        below = below_of(jobs[0])
        self.slots.load(own, carried=None if below is None else [below] * len(own))
        return self._scores(examples, jobs[0].generate)

    def _scores(self, examples: Sequence[Sequence[Example]], generate: bool) -> list[list[Score]]:
        """``[K][rows]`` scores of slot k's rows ``examples[k]`` under what is loaded."""
        pad_token_id = self.base.pad_token_id
        losses = own_loss_sums(
            self.slots, examples, batch_size=self.batch_size, pad_token_id=pad_token_id
        )
        texts: list[list[str]] | None = None
        if generate:
            texts = own_answers(
                self.slots,
                examples,
                tokenizer=self.base.tokenizer,
                max_new_tokens=self.new_tokens,
                batch_size=self.batch_size,
                pad_token_id=pad_token_id,
            )
        return [
            [
                _score_of(row, losses[k][i], texts[k][i] if texts is not None else None)
                for i, row in enumerate(rows)
            ]
            for k, rows in enumerate(examples)
        ]


def _score_of(row: Example, loss: float, text: str | None) -> Score:
    """One row's score; without a text nothing was generated."""
    score = Score(loss=loss, tokens=_answer_tokens(row), rows=1)
    if text is None:
        return score
    matches, overlap = exact_match(text, row.answer), rouge_l(text, row.answer)
    return replace(score, exact_match=matches, rouge_l=overlap, generated=1)
