"""What a client asks of the engine, and the pieces of text that it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flexlora.errors import UserError

__all__ = ["EngineFull", "FinishReason", "Piece", "Request", "Sampling", "TokenLogprob"]

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_STOPS, MAX_STOP_LENGTH, MAX_LOGPROBS = 16, 256, 20
SEEDS = 2**63


class EngineFull(RuntimeError):
    """The queue is at its bound: try again later."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of an answer are chosen, and where it ends.

    Args:
        max_tokens: tokens of the answer at most, the end token among them.
        temperature: 0 is greedy.
        top_p: tokens are drawn from the smallest set whose probability is at least this.
        seed: the same request with the same seed gets the same tokens; None draws one.
        stop: texts that end the answer and are no part of it.
        logprobs: report each token's log-probability and those of this many likeliest tokens;
            None reports nothing.

    Raises:
        UserError: a number outside its range, an empty or overlong stop text.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}, expected at least 1.")
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature is {self.temperature}, expected 0 to 100.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, expected a number above 0 and up to 1.")
        if self.seed is not None and not -SEEDS <= self.seed < SEEDS:
            raise UserError(f"seed is {self.seed}, expected a 64-bit number.")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs is {self.logprobs}, expected 0 to {MAX_LOGPROBS}.")
        if len(self.stop) > MAX_STOPS:
            raise UserError(f"stop has {len(self.stop)} texts, expected at most {MAX_STOPS}.")
        if any(not 1 <= len(text) <= MAX_STOP_LENGTH for text in self.stop):
            raise UserError(f"stop has a text that is not 1 to {MAX_STOP_LENGTH} characters long.")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt for one adapter; ``adapter`` None is the base alone.

    ``ends`` are the ids at which the answer ends, beside those of tokenizer and model: the token
    that ends a turn of a chat template.
    """

    request_id: str
    adapter: str | None
    prompt_ids: list[int]
    ends: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Log-probability of a token before temperature and top_p, and the likeliest tokens instead.

    ``top`` are pairs of token id and log-probability, the likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new of an answer: the texts of all pieces, joined, are the answer.

    ``text`` is behind ``token_ids`` where a character is incomplete or a stop text may have begun.
    ``token_ids`` and ``logprobs`` are of the same tokens; an end token is among them and has no
    text. The last piece has a ``finish_reason``; ``error`` is its cause where that is "error".
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""
