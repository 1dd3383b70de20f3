"""Greedy generation from prompts, many rows and slots in one pass.

Rows are padded on the left. An answer does not depend on the other rows of its pass: prompts near
the model's last position only share passes with prompts of equal length, as do all prompts of a
model that does not see which tokens are padding (RWKV, BART's decoder), and what follows a row's
end is removed. Generation stops where the answers that were learned end (``Example.ends``), at the
tokenizer's eos and at the ends that the model's own configuration names.

An answer is decoded unchanged: special tokens such as ``<think>`` and the spaces before
punctuation may be part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flexlora.data.collation import Example, collate_prompts
from flexlora.evaluation.padding import takes_padding
from flexlora.training.base_model import text_config
from flexlora.training.slots import SlotModel

__all__ = ["end_ids", "generate_answers", "outside_text", "passes"]


def passes(lengths: Sequence[Sequence[int]], size: int) -> Iterator[list[list[int]]]:
    """Row indices ``[K]`` of each pass: ``size // K`` rows of each slot, shortest first.

    ``lengths[k]`` are the lengths of slot k's rows; slots with fewer rows end earlier.
    """
    share = max(1, size // len(lengths))
    orders = [sorted(range(len(of_slot)), key=of_slot.__getitem__) for of_slot in lengths]
    for at in range(0, max(len(order) for order in orders), share):
        yield [order[at : at + share] for order in orders]


@torch.no_grad()
def generate_answers(
    slots: SlotModel,
    examples: Sequence[Sequence[Example]],
    *,
    tokenizer: Any,
    max_new_tokens: int,
    batch_size: int,
    pad_token_id: int,
    go_on: Callable[[], None] | None = None,
) -> list[list[str]]:
    """Greedy answers ``[K][rows]`` of slot k to the prompts ``examples[k]``, up to their end.

    ``go_on`` is called before every token and may raise.
    """
    learned = {end for rows in examples for row in rows for end in row.ends}
    longest = getattr(text_config(slots.model.config), "max_position_embeddings", None)
    answers = [[""] * len(rows) for rows in examples]
    padded = takes_padding(slots)
    for room, chosen in _by_room(examples, max_new_tokens, longest, padded):
        config = _greedy(slots.model, tokenizer, room, pad_token_id, learned)
        lengths = [[examples[k][i].prompt_length for i in ids] for k, ids in enumerate(chosen)]
        for picked in passes(lengths, batch_size):
            indices = [[chosen[k][i] for i in ids] for k, ids in enumerate(picked)]
            rows = [[examples[k][i] for i in ids] for k, ids in enumerate(indices)]
            texts = _answer(slots, rows, config, tokenizer, pad_token_id, go_on)
            for k, ids in enumerate(indices):
                for i, text in zip(ids, texts[k], strict=True):
                    answers[k][i] = text
    return answers


def _by_room(
    examples: Sequence[Sequence[Example]],
    max_new_tokens: int,
    longest: int | None,
    padded: bool = True,
) -> Iterator[tuple[int, list[list[int]]]]:
    """Rows that may share passes, as ``(tokens to generate, row indices [K])``.

    Rows with room for ``max_new_tokens`` form one group; the others, and all rows of a model that
    does not take ``padded`` prompts, one group for each prompt length. A prompt of ``longest``
    tokens or more is left out: its answer is empty.
    """
    groups: dict[tuple[int, int], list[list[int]]] = {}
    for k, rows in enumerate(examples):
        for i, row in enumerate(rows):
            room = max_new_tokens if longest is None else longest - row.prompt_length
            key = (min(room, max_new_tokens), row.prompt_length)
            key = (max_new_tokens, 0) if padded and room >= max_new_tokens else key
            groups.setdefault(key, [[] for _ in examples])[k].append(i)
    for (room, _), chosen in sorted(groups.items(), reverse=True):
        if room > 0:
            yield room, chosen


def _answer(
    slots: SlotModel,
    rows: Sequence[Sequence[Example]],
    config: Any,
    tokenizer: Any,
    pad_token_id: int,
    go_on: Callable[[], None] | None,
) -> list[list[str]]:
    """Answers to the rows of one pass, by slot."""
    batch = collate_prompts(rows, pad_token_id=pad_token_id)
    asked = {} if go_on is None else {"stopping_criteria": [_asking(go_on)]}
    with _generation_config(slots.model, config):
        output = slots.model.generate(
            input_ids=batch.input_ids.to(slots.device),
            attention_mask=batch.attention_mask.to(slots.device),
            **asked,
        )
    per_slot = batch.input_ids.shape[0] // len(rows)
    new = output[:, batch.input_ids.shape[1] :].cpu()
    ends, never = set(config.eos_token_id or []), outside_text(tokenizer)
    return [
        _decoded([_answer_of(new[k * per_slot + i], ends, never) for i in range(n)], tokenizer)
        for k, n in enumerate(map(len, rows))
    ]


def _asking(go_on: Callable[[], None]) -> Callable[..., Tensor]:
    """A stopping criterion that stops no row."""

    def no_row(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        go_on()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return no_row


def _answer_of(ids: Tensor, ends: set[int], never: set[int]) -> Tensor:
    """The tokens before the first of ``ends`` without those of ``never``.

    Generation pads a row until all have ended.
    """
    found = torch.isin(ids, torch.tensor(sorted(ends), dtype=ids.dtype)).nonzero()
    ids = ids[: int(found[0])] if len(found) else ids
    return ids[~torch.isin(ids, torch.tensor(sorted(never), dtype=ids.dtype))]


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The eos of the tokenizer and those that the model's configuration names."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return {tokenizer.eos_token_id, *named} - {None}


def outside_text(tokenizer: Any) -> set[int]:
    """The tokenizer's own padding and bos, which no answer holds."""
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "bos_token_id"))
    return {token_id for token_id in ids if token_id is not None}


def _decoded(rows: list[Tensor], tokenizer: Any) -> list[str]:
    """The text of each row, every token and every space of it, without white space at its ends."""
    if not rows:
        return []
    cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
    tokenizer.clean_up_tokenization_spaces = False  # "yes , it is ." is not "yes, it is."
    try:
        return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=False)]
    finally:
        tokenizer.clean_up_tokenization_spaces = cleans


def _greedy(
    model: Any, tokenizer: Any, max_new_tokens: int, pad_token_id: int, learned: set[int]
) -> Any:
    """A greedy configuration that stops at ``learned`` and the eos of tokenizer or model."""
    from transformers import GenerationConfig

    ends = end_ids(model, tokenizer) | learned
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends) or None,
    )


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
    """Replace ``model.generation_config`` inside the block.

    ``generate(generation_config=...)`` would fill gaps with the model's sampling, penalties and
    beams, and scores of two models could not be compared.
    """
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before
