"""A row as text: a prompt and the answer to learn.

    plain    instruction, input and "Answer: " on three lines, without empty ones
    alpaca   the Stanford Alpaca layout, in its forms with and without an input
    chat     the tokenizer's own chat template, with its generation prompt
    auto     chat where the tokenizer has a chat template, else plain

Both kinds of row work with every layout. An instruction row is one user message under a chat
template. A chat row is an instruction under the other two: the system text and the question, or
for a longer conversation turns labelled by role.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexlora.data.rows import Row
from flexlora.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TEMPLATES", "render", "resolve_template"]

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


def render(row: Row, *, template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """``(prompt, answer)``; the prompt is the same string in training and in generation.

    A chat template may write special tokens (bos among them) into the prompt as text.

    Raises:
        UserError: an unknown template, ``chat`` without a chat template, or a conversation that
            the chat template refuses.
    """
    name = resolve_template(template, tokenizer)
    if name == "chat":
        return _chat_prompt(row, tokenizer), row.output
    instruction = row.instruction if row.messages is None else _as_instruction(row.messages)
    if name == "alpaca":
        layout = _ALPACA_WITH_INPUT if row.input else _ALPACA
        return layout.format(instruction=instruction, input=row.input), row.output
    lines = [f"{text}\n" for text in (instruction, row.input) if text]
    return "".join(lines) + "Answer: ", row.output


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


def _chat_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """All turns before the answer, with the template's generation prompt."""
    from jinja2 import TemplateError

    if row.messages is None:
        content = "\n".join(text for text in (row.instruction, row.input) if text)
        turns: Sequence[tuple[str, str]] = [("user", content)]
    else:
        turns = row.messages[:-1]
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )
    except TemplateError as error:
        roles = ", ".join(role for role, _ in turns)
        raise UserError(
            f"The tokenizer's chat template refuses a row with the roles {roles} before its "
            f"answer ({error}); change the row or use data.template 'plain'."
        ) from error


def _as_instruction(messages: tuple[tuple[str, str], ...]) -> str:
    """A conversation without its answer as one instruction."""
    system = [content for role, content in messages[:-1] if role == "system" and content]
    turns = [(role, content) for role, content in messages[:-1] if role != "system"]
    if len(turns) > 1:
        lines = [f"{role.capitalize()}: {content}" for role, content in turns]
    else:
        lines = [content for _, content in turns if content]
    return "\n".join(system + lines)
