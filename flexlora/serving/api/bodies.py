"""The bodies of requests: what is read, what is ignored, what is refused.

A field that would change the answer and is not implemented is refused unless it has the value that
changes nothing, and so is an unknown one: a misspelt ``max_token`` must not be silently dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flexlora.errors import UserError, nearest
from flexlora.printable import printable
from flexlora.serving.requests import Sampling

__all__ = ["ChatBody", "CompletionBody", "LoadBody", "UnloadBody"]

# They do not change an answer. `user` to `prompt_cache_key` are for OpenAI's bookkeeping.
IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("include_obfuscation", "name", "parallel_tool_calls", "prompt_cache_retention"),
    }
)
# Fields that are not implemented, each with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p", "min_tokens"), (0,)),
    **dict.fromkeys(("tools", "functions", "tool_calls", "annotations"), ([],)),
    **dict.fromkeys(("echo", "use_beam_search", "ignore_eos"), (False,)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none",)),
    **dict.fromkeys(("audio", "prediction", "refusal", "web_search_options"), ()),
    **dict.fromkeys(("reasoning_effort", "verbosity", "guided_json"), ()),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
    "top_k": (-1, 0),
    "repetition_penalty": (1,),
}
MAX_CHOICES = 64
MAX_TURNS = 1000
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
CHAT_TOKENS, COMPLETION_TOKENS = 256, 16  # of an answer whose length is not given


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, given: Any) -> Any:
        """Without what is ignored; null is the same as absent."""
        if not isinstance(given, dict):
            return given
        return {
            key: value
            for key, value in given.items()
            if value is not None and key not in IGNORED and not _is_neutral(key, value, cls)
        }


def _is_neutral(key: str, value: Any, body: type[BaseModel]) -> bool:
    """Whether a field changes nothing; one that is read is not neutral.

    Raises:
        UserError: it is unknown, or it would change the answer.
    """
    if key in body.model_fields:
        return False
    if key not in NEUTRAL:
        hint = (
            nearest(key, body.model_fields) or f" Expected some of {', '.join(body.model_fields)}."
        )
        raise UserError(f"unknown field '{printable(key, 60)}'.{hint}")
    if value in NEUTRAL[key]:
        return True
    raise UserError(f"'{key}' is not supported; take it out.")


class _Part(_Body):
    type: str
    text: str = ""


class _Turn(_Body):
    role: str
    content: str | list[_Part]

    def pair(self, number: int) -> tuple[str, str]:
        if self.role not in ROLES:
            hint = nearest(self.role, ROLES)
            raise UserError(
                f"message {number} has the role '{self.role}', expected one of "
                f"{', '.join(ROLES)}.{hint}"
            )
        if isinstance(self.content, str):
            return ROLES[self.role], self.content
        for part in self.content:
            if part.type != "text":
                raise UserError(
                    f"message {number} has a part of type '{part.type}', expected 'text': the "
                    "model reads text only."
                )
        return ROLES[self.role], "".join(part.text for part in self.content)


class _StreamOptions(_Body):
    include_usage: bool = False


class _Generation(_Body):
    """What both endpoints read."""

    model: str = Field(min_length=1)
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: _StreamOptions | None = None

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, max_tokens: int, logprobs: int | None) -> list[Sampling]:
        """One for each of ``n`` choices; with a seed each choice has another, and the same again.

        Raises:
            UserError: a number outside its range.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return [
            Sampling(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=None if self.seed is None else self.seed + choice,
                stop=tuple(stops),
                logprobs=logprobs,
            )
            for choice in range(self.n)
        ]


class ChatBody(_Generation):
    """``POST /v1/chat/completions``."""

    messages: list[_Turn] = Field(min_length=1, max_length=MAX_TURNS)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    def turns(self) -> list[tuple[str, str]]:
        """``(role, content)`` of every message.

        Raises:
            UserError: a role or a part that the model does not read.
        """
        return [turn.pair(number) for number, turn in enumerate(self.messages, start=1)]

    def sampling(self) -> list[Sampling]:
        """One for each choice.

        Raises:
            UserError: a number outside its range, fields that contradict each other.
        """
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise UserError("max_tokens and max_completion_tokens differ; give one of them.")
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs is given without logprobs: true.")
        tokens = next(iter(limits), CHAT_TOKENS)
        return self._sampling(tokens or 0, (self.top_logprobs or 0) if self.logprobs else None)


class CompletionBody(_Generation):
    """``POST /v1/completions``."""

    prompt: Any
    logprobs: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt as a text or as token ids.

        Raises:
            UserError: another form, too many prompts.
        """
        found = _as_prompts(self.prompt)
        if len(found) * self.n > MAX_CHOICES:
            raise UserError(
                f"{len(found)} prompts with n={self.n} are {len(found) * self.n} answers, "
                f"expected at most {MAX_CHOICES} in one request."
            )
        return found

    def sampling(self) -> list[Sampling]:
        """One for each choice.

        Raises:
            UserError: a number outside its range.
        """
        tokens = COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self._sampling(tokens, self.logprobs)


def _as_prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [_unicode(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(one, str) for one in prompt):
            return [_unicode(one) for one in prompt]
        if _are_ids(prompt):
            return [prompt]
        if all(isinstance(one, list) and _are_ids(one) for one in prompt):
            return list(prompt)
    raise UserError("prompt: expected text, token ids, or a list of one of them that is not empty.")


def _unicode(text: str) -> str:
    """``text`` if UTF-8 can encode it: JSON allows half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("prompt: half of a surrogate pair, expected valid Unicode.") from None
    return text


def _are_ids(values: Sequence[Any]) -> bool:
    return all(type(value) is int for value in values)


class LoadBody(_Body):
    """``POST /v1/load_lora_adapter``, as vLLM has it."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadBody(_Body):
    """``POST /v1/unload_lora_adapter``; the id is of vLLM's bookkeeping."""

    lora_name: str
    lora_int_id: int | None = None
