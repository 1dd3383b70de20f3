"""Greedy answers to prompts alone, each slot its own rows; a row's answer knows no neighbour.

Rows are padded on the left and answered together. What a row gets does not depend on who else is in
its pass: rows near the model's last position are answered with rows of their own length only, and
what is written behind a row's end while others go on is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flexlora.data.collation import Example, collate_prompts
from flexlora.training.slots import SlotModel

__all__ = ["generate_answers", "own_answers", "passes"]


def passes(lengths: Sequence[Sequence[int]], size: int) -> Iterator[list[list[int]]]:
    """The rows of each pass by slot, ``size // K`` of each slot, the shorter ones first.

    ``lengths[k]`` are those of slot k's rows. A pass is ``[K]`` lists of indices; slots that have
    fewer rows than others end earlier.
    """
    share = max(1, size // len(lengths))
    orders = [_shortest_first(own) for own in lengths]
    for at in range(0, max(len(order) for order in orders), share):
        yield [order[at : at + share] for order in orders]


def _shortest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (lengths[i], i))


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
    return own_answers(
        slots,
        [examples] * max(slots.num_slots, 1),
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        pad_token_id=pad_token_id,
    )


@torch.no_grad()
def own_answers(
    slots: SlotModel,
    examples: Sequence[Sequence[Example]],
    *,
    tokenizer: Any,
    max_new_tokens: int,
    batch_size: int,
    pad_token_id: int,
) -> list[list[str]]:
    """The same where slot k has rows of its own, ``examples[k]``."""
    longest = getattr(slots.model.config, "max_position_embeddings", None)
    answers = [[""] * len(rows) for rows in examples]
    for room, chosen in _by_room(examples, max_new_tokens, longest):
        config = _greedy(slots.model, tokenizer, room, pad_token_id)
        lengths = [[examples[k][i].prompt_length for i in own] for k, own in enumerate(chosen)]
        for picked in passes(lengths, batch_size):
            indices = [[chosen[k][i] for i in own] for k, own in enumerate(picked)]
            rows = [[examples[k][i] for i in own] for k, own in enumerate(indices)]
            texts = _answer(slots, rows, config, tokenizer, pad_token_id)
            for k, own in enumerate(indices):
                for i, text in zip(own, texts[k], strict=True):
                    answers[k][i] = text
    return answers


def _by_room(
    examples: Sequence[Sequence[Example]], max_new_tokens: int, longest: int | None
) -> Iterator[tuple[int, list[list[int]]]]:
    """Rows that may share a pass: ``(tokens to generate, [K] lists of indices)``.

    Those with room for a whole answer are together; of the others, those of one prompt length. A
    prompt that fills all positions has room for nothing.
    """
    groups: dict[tuple[int, int], list[list[int]]] = {}
    for k, rows in enumerate(examples):
        for i, row in enumerate(rows):
            room = max_new_tokens if longest is None else longest - row.prompt_length
            key = (max_new_tokens, 0) if room >= max_new_tokens else (room, row.prompt_length)
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
) -> list[list[str]]:
    """Answers to the rows of one pass, by slot."""
    batch = collate_prompts(rows, pad_token_id=pad_token_id)
    with _own_preferences_aside(slots.model, config):
        output = slots.model.generate(
            input_ids=batch.input_ids.to(slots.device),
            attention_mask=batch.attention_mask.to(slots.device),
        )
    per_slot = batch.input_ids.shape[0] // len(rows)
    new = output[:, batch.input_ids.shape[1] :].cpu()
    return [
        [
            text.strip()
            for text in tokenizer.batch_decode(
                [_until_end(new[k * per_slot + i], config) for i in range(len(own))],
                skip_special_tokens=True,
            )
        ]
        if own
        else []
        for k, own in enumerate(rows)
    ]


def _until_end(ids: Tensor, config: Any) -> Tensor:
    """What a row said before it ended; what comes after is padding until its neighbours end."""
    ends = torch.isin(ids, torch.tensor(config.eos_token_id or [], dtype=ids.dtype)).nonzero()
    return ids[: int(ends[0])] if len(ends) else ids


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
