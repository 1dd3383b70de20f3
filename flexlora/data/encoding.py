"""Rendered text as token ids, for one tokenizer and one layout.

A prompt has the ids that the tokenizer itself gives its text: a chat template's as the template
wrote it, any other with what the tokenizer puts before every text (never what it puts after).

An answer has the ids that it has after its prompt, wherever the prompt ends at the edge of a
token: " blue" after "Answer:", and "blue" without the word mark of SentencePiece after a line end.
So it is tokenised behind ``Rendered.context``, the constant end of the prompt, whose ids are then
taken off. Where the two would merge (a chat template whose prompt ends in a space), the answer is
tokenised alone.

The text of a row cannot forge a turn. The text of a token that begins or ends one, if a row
contains it, is encoded as plain characters, as by ``sanitize_control_tokens`` of
transformers. Other special tokens, such as ``<think>``, are the tokens they name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from flexlora.data.rows import Row
from flexlora.data.templates import Layout, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextEncoder", "layout_of"]

# What transformers puts round the text of a control token in a row.
_MARKS = str.maketrans("", "", "\U000f0000\U000f0001")


def layout_of(tokenizer: PreTrainedTokenizerBase, template: str, date: str) -> Layout:
    """The layout of ``data.template``; a tokenizer's chat template is probed once.

    Raises:
        UserError: as ``Layout``.
    """
    state = (getattr(tokenizer, "chat_template", None), tokenizer.special_tokens_map)
    return _layout_of(tokenizer, template, date, f"{state}{len(tokenizer)}")


@lru_cache(maxsize=8)
def _layout_of(tokenizer: PreTrainedTokenizerBase, template: str, date: str, state: str) -> Layout:
    return Layout(template, tokenizer, date)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Ids round all answers of a kind: of their context, of an empty answer, of their end."""

    context: list[int]
    empty: list[int]
    end: list[int]


class TextEncoder:
    """Prompt and answer ids under ``layout``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> None:
        self._tokenizer, self._layout = tokenizer, layout
        self._prefix = [] if layout.chat else self._tokens_before_text()
        self._frames: dict[tuple[str, str, str | None], _Frame] = {}
        t = tokenizer
        ends = {token for token in (t.bos_token, t.eos_token, t.pad_token) if token}
        written = layout.chat.written if layout.chat else ""
        turn_end = layout.chat.shape(("user",)).end if layout.chat else None
        self._answer_controls = ends | ({turn_end} if turn_end else set())
        self._prompt_controls = ends | {
            token for token in t.get_added_vocab() if not token.isspace() and token in written
        }

    def guarded(self, row: Row) -> Row:
        """The row with marks round the text of control tokens; the row itself without any.

        In the answer only tokens that end it are control tokens.
        """
        turns = row.messages[:-1] if row.messages else ()
        texts = (row.instruction, row.input, *(content for _, content in turns))
        in_prompt = any(c in text for c in self._prompt_controls for text in texts if text)
        if not in_prompt and not any(control in row.output for control in self._answer_controls):
            return row
        output = _marked(row.output, self._answer_controls)
        messages = tuple((role, _marked(text, self._prompt_controls)) for role, text in turns)
        return replace(
            row,
            instruction=_marked(row.instruction, self._prompt_controls),
            input=_marked(row.input, self._prompt_controls),
            output=output,
            messages=(*messages, ("assistant", output)) if row.messages else None,
        )

    def prompt_ids(self, prompts: list[str], marked: Sequence[bool]) -> list[list[int]]:
        """The ids of each prompt, ``marked`` where its row was guarded."""
        ids = self._ids(prompts, marked)
        return [[*self._prefix, *row] for row in ids] if self._prefix else ids

    def answer_ids(self, texts: Sequence[Rendered], marked: Sequence[bool]) -> list[list[int]]:
        """The ids of each answer with the one that ends it; empty for an answer without any."""
        frames = [self._frame(text) for text in texts]
        behind = [
            text.context + text.learned if frame.context else text.learned
            for text, frame in zip(texts, frames, strict=True)
        ]
        ids = self._ids(behind, marked)
        merged = []
        for k, frame in enumerate(frames):
            cut = len(frame.context)
            if ids[k][:cut] == frame.context:
                ids[k] = ids[k][cut:]
            else:
                merged.append(k)
        apart = self._ids([texts[k].learned for k in merged], [marked[k] for k in merged])
        for k, row in zip(merged, apart, strict=True):
            ids[k] = row
        return [
            row + frame.end if row != frame.empty else []
            for row, frame in zip(ids, frames, strict=True)
        ]

    def token_ends(self, texts: list[str]) -> list[list[int]]:
        """End offsets of the tokens of each text; of its characters for a slow tokenizer."""
        if not self._tokenizer.is_fast or not texts:
            return [list(range(1, len(text) + 1)) for text in texts]
        offsets = tokenize(texts, self._tokenizer, return_offsets_mapping=True)["offset_mapping"]
        return [[end for _, end in spans] for spans in offsets]

    def _frame(self, text: Rendered) -> _Frame:
        key = (text.context, text.separator + text.closing, text.end)
        if key not in self._frames:
            # A context that ends in a space would merge with the answer.
            context = [] if text.context.endswith(" ") else self._ids([text.context], [False])[0]
            empty = self._ids([(text.context if context else "") + key[1]], [False])[0]
            if empty[: len(context)] == context:
                empty = empty[len(context) :]
            end = self._tokenizer.eos_token if text.end is None else text.end
            ends = [] if end is None else [self._tokenizer.added_tokens_encoder[end]]
            self._frames[key] = _Frame(context=context, empty=empty, end=ends)
        return self._frames[key]

    def ends(self, text: Rendered) -> list[int]:
        """The id that ends an answer: the template's end of turn, else eos; empty without both."""
        return self._frame(text).end

    def _tokens_before_text(self) -> list[int]:
        """The ids that the tokenizer puts before every text, such as bos or [CLS]."""
        text = "a"
        bare = self._ids([text], [False])[0]
        whole = self._tokenizer(text, verbose=False)["input_ids"]
        at = next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), 0)
        return list(whole[:at])

    def _ids(self, texts: list[str], marked: Sequence[bool]) -> list[list[int]]:
        if not any(marked):
            return tokenize(texts, self._tokenizer)["input_ids"]
        plain = [text for text, mark in zip(texts, marked, strict=True) if not mark]
        ids = iter(tokenize(plain, self._tokenizer)["input_ids"])
        return [
            self._ids_of_marked(text) if mark else next(ids)
            for text, mark in zip(texts, marked, strict=True)
        ]

    def _ids_of_marked(self, text: str) -> list[int]:
        from transformers.utils.chat_template_utils import encode_marked_chat

        try:
            return encode_marked_chat(self._tokenizer, text)
        except ValueError:  # the characters have no other token than this one
            return tokenize([unmarked(text)], self._tokenizer)["input_ids"][0]


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, **options: bool) -> dict:
    """Token ids of the texts without special tokens, which the callers add."""
    if not texts:
        return {"input_ids": []}
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,  # "longer than the maximum": max_length is checked by the caller
        **options,
    )


def unmarked(text: str) -> str:
    """The text without the marks of ``TextEncoder.guarded``."""
    return text.translate(_MARKS)


def _marked(text: str, controls: set[str]) -> str:
    if not any(control in text for control in controls):
        return text
    from transformers.utils.chat_template_utils import mark_control_tokens

    longest = sorted(controls, key=len, reverse=True)
    return str(mark_control_tokens(text, re.compile("|".join(map(re.escape, longest)))))
