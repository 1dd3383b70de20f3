"""Held-out loss, and answers that the model really generates.

Several adapters are evaluated on the same rows in one pass, one slot each. Exact match and ROUGE-L
compare a greedy generation that starts from the prompt alone with the reference: never the
teacher-forced argmax, which sees the reference while it answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from flexlora.adapters import Adapter
from flexlora.data.collation import Example, collate, collate_prompts
from flexlora.jobs import EvalJob, EvalResult, Score
from flexlora.models import BaseModel
from flexlora.slots import SlotModel
from flexlora.training import answer_losses

__all__ = ["BASE", "answer_loss_sums", "evaluate", "exact_match", "generate_answers", "rouge_l"]

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


def _by_length(examples: Sequence[Example], size: int) -> Iterable[list[int]]:
    """Indices in chunks of alike length, so that little is padded."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].input_ids), i))
    for at in range(0, len(order), size):
        yield order[at : at + size]


@torch.no_grad()
def answer_loss_sums(
    slots: SlotModel, examples: Sequence[Example], *, batch_size: int, pad_token_id: int
) -> list[list[float]]:
    """Summed answer loss of each row under each loaded slot: ``[K][rows]``; K = 1 for the base."""
    count = max(slots.num_slots, 1)
    sums = [[0.0] * len(examples) for _ in range(count)]
    for indices in _by_length(examples, max(1, batch_size // count)):
        rows = [examples[i] for i in indices]
        parts = answer_losses(slots, collate([rows] * count, pad_token_id=pad_token_id))
        lengths = [len(row.input_ids) - row.prompt_length for row in rows]
        for k, part in enumerate(parts):
            for i, losses in zip(indices, part.split(lengths), strict=True):
                sums[k][i] = float(losses.double().sum())
    return sums


@torch.no_grad()
def generate_answers(
    slots: SlotModel,
    examples: Sequence[Example],
    *,
    tokenizer: Any,
    max_new_tokens: int,
    batch_size: int,
    pad_token_id: int,
) -> list[list[str]]:
    """Greedy answers of each loaded slot to each prompt, ``[K][rows]``, without special tokens."""
    longest = getattr(slots.model.config, "max_position_embeddings", None)
    count = max(slots.num_slots, 1)
    answers = [[""] * len(examples) for _ in range(count)]
    for indices in _by_length(examples, max(1, batch_size // count)):
        rows = [examples[i] for i in indices]
        batch = collate_prompts([rows] * count, pad_token_id=pad_token_id)
        width = batch.input_ids.shape[1]
        room = max_new_tokens if longest is None else min(max_new_tokens, longest - width)
        if room < 1:
            continue  # the prompt fills all positions: nothing can be generated
        config = _greedy(slots.model, tokenizer, room, pad_token_id)
        with _own_preferences_aside(slots.model, config):
            output = slots.model.generate(
                input_ids=batch.input_ids.to(slots.device),
                attention_mask=batch.attention_mask.to(slots.device),
            )
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for position, text in enumerate(texts):
            answers[position // len(rows)][indices[position % len(rows)]] = text.strip()
    return answers


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int, pad_token_id: int) -> Any:
    """Plain greedy decoding that stops at the tokenizer's eos or at any the model itself names."""
    from transformers import GenerationConfig

    named = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends) or None,
    )


@contextmanager
def _own_preferences_aside(model: Any, config: Any) -> Iterator[None]:
    """Put ``config`` in the place of the model's: a config passed to ``generate`` is filled up with
    the model's own sampling, penalties and beams, and two models could no longer be compared."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def evaluate(
    slots: SlotModel,
    base: BaseModel,
    jobs: Sequence[EvalJob],
    examples: Sequence[Sequence[Example]],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[EvalResult]:
    """Scores of every job's adapters on its own rows; jobs that share adapters share passes."""
    scores: list[dict[str, Score]] = [{} for _ in jobs]
    for members, job in _groups(jobs):
        rows = [row for k in members for row in examples[k]]
        owners = [k for k in members for _ in examples[k]]
        if not rows:
            continue
        # Classes that are served the same adapter are scored once.
        distinct = {adapter.digest(): adapter for adapter in job.adapters.values()}
        per_slot = _score(
            slots, base, list(distinct.values()), rows, job.generate, batch_size, max_new_tokens
        )
        by_digest = dict(zip(distinct or [BASE], per_slot, strict=True))
        for name in job.adapters or [BASE]:
            row_scores = by_digest[job.adapters[name].digest() if job.adapters else BASE]
            for k, score in zip(owners, row_scores, strict=True):
                scores[k][name] = scores[k].get(name, Score()) + score
    slots.clear()
    return [
        EvalResult(client_id=job.client_id, scores=score)
        for job, score in zip(jobs, scores, strict=True)
    ]


def _groups(jobs: Sequence[EvalJob]) -> Iterable[tuple[list[int], EvalJob]]:
    """Jobs with the same adapters and the same questions, by their first member."""
    groups: dict[tuple, list[int]] = {}
    for k, job in enumerate(jobs):
        digests = tuple((name, adapter.digest()) for name, adapter in job.adapters.items())
        groups.setdefault((job.generate, digests), []).append(k)
    for members in groups.values():
        yield members, jobs[members[0]]


def _score(
    slots: SlotModel,
    base: BaseModel,
    adapters: Sequence[Adapter],
    rows: Sequence[Example],
    generate: bool,
    batch_size: int,
    max_new_tokens: int,
) -> list[list[Score]]:
    """``[slots][rows]`` scores under each adapter, or under the bare base where there is none."""
    slots.load(adapters) if adapters else slots.clear()
    losses = answer_loss_sums(slots, rows, batch_size=batch_size, pad_token_id=base.pad_token_id)
    texts: list[list[str]] | None = None
    if generate:
        texts = generate_answers(
            slots,
            rows,
            tokenizer=base.tokenizer,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            pad_token_id=base.pad_token_id,
        )
    return [
        [
            Score(
                loss=losses[k][i],
                tokens=len(row.input_ids) - row.prompt_length,
                rows=1,
                exact_match=exact_match(texts[k][i], row.answer) if texts else 0.0,
                rouge_l=rouge_l(texts[k][i], row.answer) if texts else 0.0,
                generated=1 if texts else 0,
            )
            for i, row in enumerate(rows)
        ]
        for k in range(len(losses))
    ]
