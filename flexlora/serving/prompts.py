"""Prompts as a run trained with them: a conversation, or a text, as token ids.

The layout is the run's ``data.template`` (``flexlora/data/templates.py``), so a model sees at its
first answer token what it saw there in training.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexlora.data.chat import DEFAULT_DATE
from flexlora.data.encoding import TextEncoder
from flexlora.data.rows import Row
from flexlora.data.templates import Layout, Rendered

__all__ = ["ChatPrompt", "Prompts"]

Turns = Sequence[tuple[str, str]]  # (role, content)
PATTERNS = 256  # sequences of roles whose probes by the chat template are remembered


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """A conversation that waits for its answer.

    ``ends`` are the ids that end the answer; ``separator`` is white space that begins it and that
    a reader does not want to see.
    """

    ids: list[int]
    ends: tuple[int, ...]
    separator: str


class Prompts:
    """Encodes prompts with a copy of ``tokenizer``; may be called from any thread.

    A copy, since encoding a guarded prompt changes a tokenizer for a moment, while the engine's
    thread decodes with it.

    Raises:
        UserError: as ``Layout``.
    """

    def __init__(self, tokenizer: Any, *, template: str = "auto", date: str = DEFAULT_DATE) -> None:
        self._tokenizer, self._template, self._date = copy.deepcopy(tokenizer), template, date
        self._lock = threading.Lock()
        self._text = TextEncoder(self._tokenizer, Layout("plain", self._tokenizer))
        self._begin()

    def _begin(self) -> None:
        self._layout = Layout(self._template, self._tokenizer, self._date)
        self._encoder = TextEncoder(self._tokenizer, self._layout)
        self._patterns: set[tuple[str, ...]] = set()

    @property
    def template(self) -> str:
        """``plain``, ``alpaca`` or ``chat``."""
        return self._layout.name

    def text(self, text: str) -> list[int]:
        """The ids of a text as it is, with what the tokenizer puts before every text."""
        with self._lock:
            return self._text.prompt_ids([text], [False])[0]

    def chat(self, turns: Turns) -> ChatPrompt:
        """The ids of a conversation up to where its answer begins.

        The text of a control token in a turn is encoded as plain characters, as in training.

        Raises:
            UserError: the chat template refuses the roles.
        """
        with self._lock:
            self._patterns.add(tuple(role for role, _ in turns))
            if len(self._patterns) > PATTERNS:
                self._begin()
            answer = self._first_words(turns)
            row = Row(output=answer, messages=(*turns, ("assistant", answer)))
            guarded = self._encoder.guarded(row)
            rendered: Rendered = self._layout.render(guarded)
            ids = self._encoder.prompt_ids([rendered.prompt], [guarded is not row])[0]
            ends = tuple(self._encoder.ends(rendered))
        return ChatPrompt(ids=ids, ends=ends, separator=rendered.separator)

    def _first_words(self, turns: Turns) -> str:
        """An answer that keeps open a ``<think>`` that the generation prompt opens."""
        if self._layout.chat is None:
            return ""
        shape = self._layout.chat.shape(tuple(role for role, _ in turns))
        closing = f"</{shape.opened}>"
        return closing if shape.opened is not None and closing not in shape.lead else ""
