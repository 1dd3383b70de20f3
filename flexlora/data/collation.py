"""Rows as tokens, and K slots of tokens as one batch.

    input_ids = ids(prompt) + ids(answer) + [end]      end: the template's end of turn, else eos

No token lies across the boundary (``encoding.py``), so generation starts from exactly the prompt
ids of training. The loss is on the answer and its end only.

If a prompt is too long for ``max_length``, its input text is shortened from the end by tokens, to
at least one, and rendered again. The instruction, the turns of a conversation and the answer are
never cut; a row that still does not fit is dropped and counted.

A multiple-choice row is encoded once for each choice, all with the same prompt: it is cut so that
the longest choice fits.

A slot is one client in a cohort. K slots with unequal numbers of rows make one slot-major batch
``[K * b, T]`` with ``b`` the most rows of any slot; the others are padded with dummy rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexlora.data.chat import DEFAULT_DATE
from flexlora.data.encoding import TextEncoder, layout_of, unmarked
from flexlora.data.rows import Row
from flexlora.data.templates import Layout
from flexlora.errors import UserError
from flexlora.seeds import numpy_generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Example",
    "batch_plan",
    "collate",
    "collate_prompts",
    "encode_rows",
]

IGNORE_INDEX = -100  # the label that torch's cross entropy ignores


@dataclass(frozen=True, kw_only=True)
class Example:
    """One encoded row: prompt ids ``input_ids[:prompt_length]``, then the answer and its end.

    ``ends`` are the ids at which a generated answer stops, beside those of tokenizer and model.
    ``choices`` are the prompt with each choice of a multiple-choice row, the right one among them.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    prompt: str
    answer: str
    task: str | None = None
    category: str | None = None
    ends: tuple[int, ...] = ()
    choices: tuple[Example, ...] = ()
    pattern: str | None = None

    @property
    def answer_tokens(self) -> int:
        """Tokens that the loss is on: the answer and its end."""
        return len(self.input_ids) - self.prompt_length

    @property
    def right_choice(self) -> int:
        """The index of the right one of ``choices``."""
        return [choice.answer for choice in self.choices].index(self.answer)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """K slots of b rows each, slot-major: slot k holds rows ``k * b`` to ``k * b + b - 1``.

    The first ``rows_per_slot[k]`` of them are real. ``lengths_per_slot[k]`` is the length T_k of
    slot k's longest row (0 without rows), the width of a batch of that slot alone.
    """

    input_ids: Tensor  # [K * b, T] int64
    attention_mask: Tensor  # [K * b, T] int64
    labels: Tensor  # [K * b, T] int64, IGNORE_INDEX outside answers
    rows_per_slot: tuple[int, ...]
    lengths_per_slot: tuple[int, ...]


def encode_rows(
    rows: Sequence[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    date: str = DEFAULT_DATE,
) -> tuple[list[Example], int]:
    """The rows that fit, in order, and the number of dropped rows.

    A row's encoding does not depend on the other rows.

    Raises:
        UserError: as ``templates.render``, or a ``max_length`` below 1.
    """
    encoded = _encode(rows, tokenizer, template, max_length, date)
    examples = [example for example in encoded if example is not None]
    return examples, len(rows) - len(examples)


def batch_plan(
    num_examples: int, *, batch_size: int, steps: int, seed_parts: Sequence[Any]
) -> list[list[int]]:
    """Indices of ``steps`` batches: epochs of shuffled indices, each cut into ``batch_size``.

    An epoch is ``ceil(num_examples / batch_size)`` steps, the last with the remaining rows, and has
    every example once. ``seed_parts`` are the arguments of ``seeds.numpy_generator``; a longer plan
    begins with the shorter one.
    """
    if num_examples < 1 or batch_size < 1 or steps < 0:
        raise ValueError(
            f"batch_plan got num_examples={num_examples}, batch_size={batch_size}, steps={steps}; "
            "expected at least 1, 1 and 0. Skip clients without rows before planning."
        )
    seed, *purpose = seed_parts
    plan: list[list[int]] = []
    epoch = 0
    while len(plan) < steps:
        order = numpy_generator(seed, *purpose, epoch).permutation(num_examples).tolist()
        plan += [order[at : at + batch_size] for at in range(0, num_examples, batch_size)]
        epoch += 1
    return plan[:steps]


def collate(slots: Sequence[Sequence[Example]], *, pad_token_id: int) -> Batch:
    """The slots as one right-padded batch for training.

    A dummy row is a copy of another row without labels: rows of padding alone have no norm, whose
    gradient is NaN in some models.
    Rows from ``k * b``, cut to T_k columns, are the batch of slot k alone.
    """
    rows = [[(e.input_ids, _labels(e)) for e in slot] for slot in slots]
    return _stack(rows, pad_token_id, left=False)


def collate_prompts(slots: Sequence[Sequence[Example]], *, pad_token_id: int) -> Batch:
    """The prompts, left-padded for generation, in the layout of ``collate``, without labels."""
    prompts = [[e.input_ids[: e.prompt_length] for e in slot] for slot in slots]
    rows = [[(ids, (IGNORE_INDEX,) * len(ids)) for ids in slot] for slot in prompts]
    return _stack(rows, pad_token_id, left=True)


def _labels(example: Example) -> tuple[int, ...]:
    hidden = (IGNORE_INDEX,) * example.prompt_length
    return hidden + example.input_ids[example.prompt_length :]


def _stack(slots: list[list[tuple]], pad_token_id: int, *, left: bool) -> Batch:
    """``(ids, labels)`` pairs to ``[K * b, T]``, padded on the left or on the right."""
    lengths = tuple(max((len(ids) for ids, _ in slot), default=0) for slot in slots)
    rows_per_slot = tuple(len(slot) for slot in slots)
    if not any(rows_per_slot):
        raise ValueError(
            f"cannot collate {len(slots)} slots without any example; leave out the step."
        )
    per_slot, width = max(rows_per_slot), max(lengths)
    first = next(ids for slot in slots for ids, _ in slot)
    dummy = (first, (IGNORE_INDEX,) * len(first))
    shape = (len(slots) * per_slot, width)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for k, slot in enumerate(slots):
        for i in range(per_slot):
            row = k * per_slot + i
            ids, row_labels = slot[i] if i < len(slot) else dummy
            span = slice(width - len(ids), width) if left else slice(0, len(ids))
            input_ids[row, span] = torch.tensor(ids)
            attention_mask[row, span] = 1
            labels[row, span] = torch.tensor(row_labels)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        rows_per_slot=rows_per_slot,
        lengths_per_slot=lengths,
    )


def _encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    date: str,
) -> list[Example | None]:
    if max_length < 1:
        raise UserError(f"train.max-length is {max_length}, expected at least 1; raise it.")
    counts = [len(row.choices or (row.output,)) for row in rows]
    variants = [
        row if row.choices is None else replace(row, output=choice)
        for row in rows
        for choice in row.choices or (row.output,)
    ]
    encoded = iter(_encode_each(variants, counts, tokenizer, template, max_length, date))
    return [
        _with_choices(row, [next(encoded) for _ in range(count)])
        for row, count in zip(rows, counts, strict=True)
    ]


def _with_choices(row: Row, variants: list[Example | None]) -> Example | None:
    """The row's example of those of its choices; None where one of them does not fit."""
    if row.choices is None:
        return variants[0]
    choices = tuple(example for example in variants if example is not None)
    if len(choices) < len(variants):
        return None
    return replace(choices[row.choices.index(row.output)], choices=choices)


def _encode_each(
    rows: Sequence[Row],
    counts: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    date: str,
) -> list[Example | None]:
    """The rows one by one; of each ``counts`` rows in turn the prompt has the same room."""
    layout = layout_of(tokenizer, template, date)
    encoder = TextEncoder(tokenizer, layout)
    guarded = [encoder.guarded(row) for row in rows]
    marked = [ours is not row for ours, row in zip(guarded, rows, strict=True)]
    texts = [layout.render(row) for row in guarded]
    answer_ids = encoder.answer_ids(texts, marked)
    lengths = iter([len(ids) for ids in answer_ids])
    longest = [max(next(lengths) for _ in range(n)) for n in counts]
    budgets = [max_length - n for n, k in zip(longest, counts, strict=True) for _ in range(k)]
    prompts = _Prompts(guarded, marked, [text.prompt for text in texts], layout, encoder)
    prompts.cut(budgets)
    return [
        Example(
            input_ids=(*prompts.ids[i], *answer_ids[i]),
            prompt_length=len(prompts.ids[i]),
            prompt=unmarked(prompts.texts[i]) if marked[i] else prompts.texts[i],
            answer=unmarked(text.answer) if marked[i] else text.answer,
            task=rows[i].task,
            category=rows[i].category,
            pattern=rows[i].pattern,
            ends=tuple(encoder.ends(text)),
        )
        # An answer without any token has no loss.
        if answer_ids[i] and len(prompts.ids[i]) <= budgets[i]
        else None
        for i, text in enumerate(texts)
    ]


class _Prompts:
    """The prompts of ``rows`` as texts and ids."""

    def __init__(
        self,
        rows: Sequence[Row],
        marked: Sequence[bool],
        texts: list[str],
        layout: Layout,
        encoder: TextEncoder,
    ) -> None:
        self._rows, self._marked, self._layout, self._encoder = rows, marked, layout, encoder
        self.texts, self.ids = texts, encoder.prompt_ids(texts, marked)

    def cut(self, budgets: Sequence[int]) -> None:
        """Shorten inputs until the prompts fit their budgets, where possible.

        In each iteration an input is shortened by the number of excess tokens and all new prompts
        are tokenised together, until each fits or has one token of input left. Cutting inside a
        word can change the number of its tokens, so that usually takes one or two iterations.
        """
        long = [
            i for i, row in enumerate(self._rows) if len(self.ids[i]) > budgets[i] > 0 and row.input
        ]
        ends = dict(
            zip(long, self._encoder.token_ends([self._rows[i].input for i in long]), strict=True)
        )
        lengths = {i: len(ends[i]) for i in long}
        while long := [i for i in long if len(self.ids[i]) > budgets[i] and lengths[i] > 1]:
            for i in long:
                lengths[i] = max(1, lengths[i] - (len(self.ids[i]) - budgets[i]))
                row = replace(self._rows[i], input=self._rows[i].input[: ends[i][lengths[i] - 1]])
                self.texts[i] = self._layout.render(row).prompt
            new = self._encoder.prompt_ids(
                [self.texts[i] for i in long], [self._marked[i] for i in long]
            )
            for i, ids in zip(long, new, strict=True):
                self.ids[i] = ids
