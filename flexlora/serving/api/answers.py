"""Pieces of text as OpenAI's objects: whole answers and the chunks of a stream.

Both endpoints share ids, usage and the way that pieces are joined; their choices and
log-probabilities have other shapes.
"""

from __future__ import annotations

import codecs
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexlora.serving.api.token_bytes import TokenBytes
from flexlora.serving.requests import Piece, TokenLogprob

__all__ = ["Answers", "ChatAnswers", "CompletionAnswers", "joined"]

LOWEST = -9999.0  # OpenAI's log-probability of what cannot be: JSON has no infinity


def joined(pieces: Iterable[tuple[int, Piece]]) -> dict[int, Piece]:
    """The pieces of each choice as one."""
    by_choice: dict[int, list[Piece]] = {}
    for index, piece in pieces:
        by_choice.setdefault(index, []).append(piece)
    return {
        index: Piece(
            text="".join(piece.text for piece in these),
            token_ids=tuple(token for piece in these for token in piece.token_ids),
            logprobs=tuple(logprob for piece in these for logprob in piece.logprobs),
            finish_reason=these[-1].finish_reason,
        )
        for index, these in by_choice.items()
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST


@dataclass(kw_only=True)
class Answers(ABC):
    """The answer to one HTTP call.

    ``ends`` are the tokens that end an answer: no part of it, so that log-probabilities leave them
    out. Usage counts them, as they were generated. ``separator`` begins an answer and is removed.
    """

    call_id: str
    model: str
    prompt_tokens: int
    ends: frozenset[int]
    token_bytes: TokenBytes
    logprobs: bool = False
    separator: str = ""
    with_usage: bool = False
    completion_tokens: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    _begun: set[int] = field(default_factory=set)

    whole_name = chunk_name = ""

    def whole(self, pieces: Sequence[tuple[int, Piece]]) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        choices = [
            {
                "index": index,
                "finish_reason": piece.finish_reason,
                "logprobs": self._logprobs(index, piece),
                **self._content(self._text(index, piece)),
            }
            for index, piece in sorted(joined(pieces).items())
        ]
        return {**self._head(self.whole_name), "choices": choices, "usage": self._usage()}

    def chunks(self, pieces: Sequence[tuple[int, Piece]]) -> list[dict[str, Any]]:
        """The objects of a stream for pieces that have arrived; none where nothing is to show."""
        found = []
        for index, piece in joined(pieces).items():
            text, logprobs = self._text(index, piece), self._logprobs(index, piece)
            if text or logprobs or piece.finish_reason:
                delta = self._delta(text)
                found.append(self._chunk(index, delta, logprobs, piece.finish_reason))
        return found

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        """What a stream of ``count`` choices begins with."""
        return []

    def last_chunks(self) -> list[dict[str, Any]]:
        """What a stream ends with."""
        if not self.with_usage:
            return []
        return [{**self._head(self.chunk_name), "choices": [], "usage": self._usage()}]

    def _chunk(self, index: int, delta: dict, logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.with_usage else {}
        return {**self._head(self.chunk_name), "choices": [choice], **usage}

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self.call_id, "object": name, "created": self.created, "model": self.model}

    def _usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {**counts, "total_tokens": total}

    def _text(self, index: int, piece: Piece) -> str:
        """The text of a piece; the first one without the separator."""
        self.completion_tokens += len(piece.token_ids)
        if index in self._begun or not piece.text:
            return piece.text
        self._begun.add(index)
        return piece.text.removeprefix(self.separator)

    def _shown(self, piece: Piece) -> list[TokenLogprob]:
        return [one for one in piece.logprobs if one.token_id not in self.ends]

    def _token(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]:
        """The text in the choice of a whole answer."""

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """The text in the choice of a chunk."""

    @abstractmethod
    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """The log-probabilities of a piece in the shape of the endpoint."""


@dataclass(kw_only=True)
class ChatAnswers(Answers):
    """``/v1/chat/completions``."""

    whole_name, chunk_name = "chat.completion", "chat.completion.chunk"

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(index, delta, None, None) for index in range(count)]

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {
                **self._named(one.token_id, one.logprob),
                "top_logprobs": [self._named(token, logprob) for token, logprob in one.top],
            }
            for one in self._shown(piece)
        ]
        return {"content": content, "refusal": None} if content else None

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.token_bytes(token_id)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


@dataclass(kw_only=True)
class CompletionAnswers(Answers):
    """``/v1/completions``."""

    _decoders: dict[int, codecs.IncrementalDecoder] = field(default_factory=dict)
    _offsets: dict[int, int] = field(default_factory=dict)

    whole_name = chunk_name = "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        shown = self._shown(piece) if self.logprobs else []
        if not shown:
            return None
        return {
            "tokens": [self._token(one.token_id) for one in shown],
            "token_logprobs": [_finite(one.logprob) for one in shown],
            "top_logprobs": [
                {self._token(token): _finite(logprob) for token, logprob in one.top}
                for one in shown
            ],
            "text_offset": [self._offset(index, one.token_id) for one in shown],
        }

    def _offset(self, index: int, token_id: int) -> int:
        """Characters of the answer that are complete before this token."""
        make = codecs.getincrementaldecoder("utf-8")
        decoder = self._decoders.setdefault(index, make(errors="replace"))
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(decoder.decode(self.token_bytes(token_id)))
        return offset
