"""A row as text: a prompt, and the answer to learn.

    plain    instruction, input and "Answer:" on three lines, without empty ones
    alpaca   the Stanford Alpaca layout, in its forms with and without an input
    chat     the tokenizer's own chat template, with its generation prompt (``chat.py``)
    auto     chat where the tokenizer has a chat template, else plain

Both kinds of row work with every layout. An instruction row is one user message under a chat
template. A chat row is an instruction under the other two: the system text and the question, or
for a longer conversation turns labelled by role.

A space between prompt and answer belongs to the answer ("Answer:" + " blue"): tokenizers merge it
with the word after it, and at the end of a prompt it would be a token that no text has there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexlora.data.chat import DEFAULT_DATE, ChatTemplate, parse_date
from flexlora.data.rows import Row
from flexlora.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TEMPLATES", "Layout", "Rendered", "render", "resolve_template"]

TEMPLATES = ("auto", "plain", "alpaca", "chat")

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A row as text: ``prompt + separator + answer + closing``, then the end of the turn.

    ``context`` is the end of the prompt as far as it is the same for all rows of a kind, and
    ``end`` the token that ends the answer (None: the tokenizer's eos).
    """

    prompt: str
    separator: str
    answer: str
    closing: str = ""
    context: str
    end: str | None = None

    @property
    def learned(self) -> str:
        """What the model learns after the prompt, without the token that ends it."""
        return self.separator + self.answer + self.closing


class Layout:
    """``data.template`` for one tokenizer; ``name`` is ``plain``, ``alpaca`` or ``chat``.

    Raises:
        UserError: as ``resolve_template`` and ``ChatTemplate``, or a date that is none.
    """

    def __init__(
        self, template: str, tokenizer: PreTrainedTokenizerBase, date: str = DEFAULT_DATE
    ) -> None:
        parse_date(date)
        self.name = resolve_template(template, tokenizer)
        self.chat = ChatTemplate(tokenizer, date) if self.name == "chat" else None

    def render(self, row: Row) -> Rendered:
        """The row as text.

        Raises:
            UserError: the chat template refuses the row or would lose some of it.
        """
        if self.chat is not None:
            return _chat(row, self.chat)
        instruction = row.instruction if row.messages is None else _as_instruction(row.messages)
        if self.name == "alpaca":
            layout = _ALPACA_WITH_INPUT if row.input else _ALPACA
            prompt = layout.format(instruction=instruction, input=row.input)
            return Rendered(
                prompt=prompt, separator="", answer=row.output, context="### Response:\n"
            )
        lines = [f"{text}\n" for text in (instruction, row.input) if text]
        prompt = "".join(lines) + "Answer:"
        return Rendered(prompt=prompt, separator=" ", answer=row.output, context="Answer:")

    def check(self, rows: Iterable[Row]) -> None:
        """Refuse rows that cannot be rendered, without rendering them.

        Raises:
            UserError: as ``render`` for a row's roles and the form of its answer.
        """
        if self.chat is not None:
            for row in rows:
                shape = self.chat.shape(tuple(role for role, _ in _turns(row)))
                self.chat.continued(row.output, shape)


def render(row: Row, *, template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """``(prompt, learned)``; the prompt is the same string in training and in generation.

    A chat template may write special tokens (bos among them) into the prompt as text.

    Raises:
        UserError: an unknown template, ``chat`` without a chat template, or a conversation that
            the chat template refuses.
    """
    rendered = Layout(template, tokenizer).render(row)
    return rendered.prompt, rendered.learned


def resolve_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The layout for this tokenizer; never ``auto``.

    Raises:
        UserError: an unknown name, or ``chat`` where the tokenizer has no chat template.
    """
    if template not in TEMPLATES:
        raise UserError(
            f"data.template is '{template}', expected one of {', '.join(TEMPLATES)}."
            f"{nearest(template, TEMPLATES)}"
        )
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "auto":
        return "chat" if has_chat else "plain"
    if template == "chat" and not has_chat:
        raise UserError(
            "data.template is 'chat', but this model's tokenizer has no chat template; use "
            "'auto', 'plain' or 'alpaca', or a model tuned for chat."
        )
    return template


def _chat(row: Row, chat: ChatTemplate) -> Rendered:
    turns = _turns(row)
    shape = chat.shape(tuple(role for role, _ in turns))
    lead, separator, answer = chat.continued(row.output, shape)
    return Rendered(
        prompt=chat.prompt(turns) + lead,
        separator=separator,
        answer=answer,
        closing=shape.closing,
        context=shape.after_turn + lead,
        end=shape.end,
    )


def _turns(row: Row) -> Sequence[tuple[str, str]]:
    """All turns before the answer."""
    if row.messages is not None:
        return row.messages[:-1]
    return [("user", "\n".join(text for text in (row.instruction, row.input) if text))]


def _as_instruction(messages: tuple[tuple[str, str], ...]) -> str:
    """A conversation without its answer as one instruction."""
    system = [content for role, content in messages[:-1] if role == "system" and content]
    turns = [(role, content) for role, content in messages[:-1] if role != "system"]
    if len(turns) > 1:
        lines = [f"{role.capitalize()}: {content}" for role, content in turns]
    else:
        lines = [content for _, content in turns if content]
    return "\n".join(system + lines)
