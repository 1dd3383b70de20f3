"""A tokenizer's chat template: the prompts it writes, and where an answer begins and ends in it.

A template is a program. The text that it puts before and after an answer is found by rendering the
same turns twice, with sentinels as contents: with the generation prompt, and with the answer.

    generation prompt   ... last turn | after the turn
    whole conversation  ... last turn | before the answer | answer | after the answer

The prompt is exactly the template's generation prompt. What the whole conversation writes beyond
it is added: to the prompt if it is text (a header that the generation prompt lacks, the
empty ``<think>`` block of Qwen3's), to the answer if it is white space. After the answer, all up
to the first added token of the tokenizer is the end of the turn.

Templates that read the clock are given one day: ``strftime_now`` becomes a macro of the template.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexlora.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DEFAULT_DATE", "ChatTemplate", "Shape", "parse_date"]

Turns = Sequence[tuple[str, str]]  # (role, content)

# The day that Llama 3's templates name where they cannot read a clock.
DEFAULT_DATE = "2024-07-26"
# Mixed case and digits, so that a template that changes letters shows.
_ANSWER = "The Answer 4Xq"
_OPEN_TAG = re.compile(r"<(\w+)>\s*$")
_REMEDY = "use data.template 'plain' or 'alpaca', or a model with another template"


def parse_date(text: str) -> datetime.date:
    """``data.template-date`` as a day.

    Raises:
        UserError: not of the form YYYY-MM-DD.
    """
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"data.template-date is '{text}', expected a day such as {DEFAULT_DATE}."
        ) from None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a template writes round the answer to turns of certain roles."""

    after_turn: str  # between the last turn's content and the end of the generation prompt
    lead: str  # added to the prompt
    separator: str  # white space that begins the answer
    closing: str  # between the answer and the token that ends it
    end: str | None  # the token that ends the turn; None where the template writes none
    strips: bool  # whether the template strips an answer
    opened: str | None  # the name of the tag that the generation prompt leaves open: ``think``

    @property
    def context(self) -> str:
        """The end of a prompt that is the same for all rows of this shape."""
        return self.after_turn + self.lead


class ChatTemplate:
    """The chat template of ``tokenizer``, rendered on the day ``date``.

    Raises:
        UserError: several templates of which none is the default, a template that cannot be
            rendered or does not write a user's content.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str = DEFAULT_DATE) -> None:
        self._tokenizer = tokenizer
        self._text = _on_day(_default_template(tokenizer), parse_date(date))
        self._shapes: dict[tuple[str, ...], Shape] = {}
        self._parts = False
        self._parts = self._wants_parts()

    @property
    def written(self) -> str:
        """All that the template writes round one user's turn and its answer."""
        shape = self.shape(("user",))
        prompt = self.prompt([("user", _ANSWER)]) + shape.closing + (shape.end or "")
        if shape.opened is None:
            return prompt
        return prompt.replace(shape.after_turn, _OPEN_TAG.sub("", shape.after_turn))

    def prompt(self, turns: Turns) -> str:
        """The turns and the generation prompt.

        Raises:
            UserError: the template refuses the turns.
        """
        return self._render(turns, add_generation_prompt=True)

    def shape(self, roles: tuple[str, ...]) -> Shape:
        """The text before and after an answer to turns of these roles, rendered once.

        Raises:
            UserError: the template refuses the roles, drops or changes a turn's content, or writes
                an answer elsewhere than after its generation prompt.
        """
        if roles not in self._shapes:
            self._shapes[roles] = self._probe(roles)
        return self._shapes[roles]

    def continued(self, answer: str, shape: Shape) -> tuple[str, str, str]:
        """``(lead, separator, answer)`` of one answer: it may write the template's tag itself.

        An answer with reasoning (``<think>...</think>...``) takes the place of the empty block
        that the template would put before it, and goes on where the generation prompt has opened
        the tag.

        Raises:
            UserError: the generation prompt opens a tag that the answer does not close.
        """
        text = answer.strip() if shape.strips else answer
        tag = shape.opened
        if tag is None:
            own = re.match(r"<(\w+)>", shape.lead.lstrip())
            reasons = own and answer.lstrip().startswith(own[0])
            return ("", "", answer.lstrip()) if reasons else (shape.lead, shape.separator, text)
        if f"</{tag}>" in answer:
            return "", "", re.sub(rf"\A\s*<{tag}>\s*", "", answer)
        if f"</{tag}>" in shape.lead:
            return shape.lead, shape.separator, text
        raise UserError(
            f"The tokenizer's chat template begins every answer with '<{tag}>', but the answer "
            f"'{answer.strip()[:40]}' has no '</{tag}>'; write the reasoning into the answers, or "
            f"{_REMEDY}."
        )

    def _render(self, turns: Turns, *, add_generation_prompt: bool = False) -> str:
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}] if self._parts else text}
            for role, text in turns
        ]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._text,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except Exception as error:  # a template is a program: any error is its refusal
            answered = bool(turns) and turns[-1][0] == "assistant"
            roles = ", ".join(role for role, _ in (turns[:-1] if answered else turns))
            raise UserError(
                f"The tokenizer's chat template refuses a row with the roles {roles} before its "
                f"answer ({one_line(error)}); change the row or use data.template 'plain'."
            ) from error

    def _wants_parts(self) -> bool:
        """Whether the template reads contents as lists of parts only."""
        turns, failure = [("user", _ANSWER)], None
        try:
            if _ANSWER in self.prompt(turns):
                return False
        except UserError as error:
            failure = error
        self._parts = True
        try:
            if _ANSWER in self.prompt(turns):
                return True
        except UserError:
            pass
        raise failure or _loses("user")

    def _probe(self, roles: tuple[str, ...]) -> Shape:
        turns = [(role, f"Content {i} of a Turn") for i, role in enumerate(roles)]
        prompt = self._render(turns, add_generation_prompt=True)
        whole = self._render([*turns, ("assistant", _ANSWER)])
        for role, content in turns:
            if content not in prompt:
                raise _loses(role)
        last = turns[-1][1]
        if last not in whole or whole.count(_ANSWER) != 1:
            raise _loses("assistant")
        before, after = whole.split(_ANSWER)
        after_turn, wanted = prompt.rpartition(last)[2], before.rpartition(last)[2]
        lead, separator = _beyond(after_turn, wanted)
        closing, end = self._turn_end(after)
        spaced = self._render([*turns, ("assistant", f"\n {_ANSWER}\n ")])
        return Shape(
            after_turn=after_turn,
            lead=lead,
            separator=separator,
            closing=closing,
            end=end,
            strips=f"\n {_ANSWER}" not in spaced,
            opened=self._opened(after_turn, wanted),
        )

    def _opened(self, after_turn: str, wanted: str) -> str | None:
        """The tag that ends the generation prompt and that an answer has to close.

        A tag that the template never closes and writes before every answer (``<assistant>``,
        MiniCPM's ``<AI>``) names the speaker.
        """
        found = _OPEN_TAG.search(after_turn)
        if found is None:
            return None
        marks_speaker = f"<{found[1]}>" in wanted and f"</{found[1]}>" not in self._text
        return None if marks_speaker else found[1]

    def _turn_end(self, after: str) -> tuple[str, str | None]:
        """The text between the answer and the first added token after it, and that token."""
        found = [
            (at, -len(token), token)
            for token in self._tokenizer.get_added_vocab()
            if not token.isspace() and (at := after.find(token)) >= 0
        ]
        if not found:
            return "", None
        at, _, token = min(found)
        return after[:at], token


def _default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The one template that is meant where none is named."""
    templates: Any = tokenizer.chat_template
    if not isinstance(templates, dict):
        return str(templates)
    if "default" in templates:
        return str(templates["default"])
    if len(templates) == 1:
        return str(next(iter(templates.values())))
    raise UserError(
        f"The tokenizer has the chat templates {', '.join(sorted(templates))}, and none is called "
        f"'default'; give one of them that name in the model's folder, or {_REMEDY}."
    )


def _on_day(template: str, day: datetime.date) -> str:
    """The template with a ``strftime_now`` that reads ``day``, midnight, instead of the clock."""
    if "strftime_now" not in template:
        return template
    values = {
        f"%{letter}": day.strftime(f"%{letter}") for letter in "aAwdbBmyYHIpMSfzZjUWcxXGuVDeFT"
    }
    values |= {f"%-{letter}": values[f"%{letter}"].lstrip("0") or "0" for letter in "dmyHIMSj"}
    # No value holds a '%' but that of '%%', which therefore comes last.
    filters = "".join(f"|replace('{name}','{value}')" for name, value in values.items())
    # trim_blocks removes the line end, so the template begins on a new line as before.
    return (
        "{%- macro strftime_now(format) -%}{{ format" + filters + "|replace('%%','%') }}"
        "{%- endmacro %}\n" + template
    )


def _beyond(after_turn: str, wanted: str) -> tuple[str, str]:
    """The lead and the separator between the generation prompt and the answer.

    Raises:
        UserError: the whole conversation writes something else than the generation prompt.
    """
    if wanted.startswith(after_turn):
        rest = wanted[len(after_turn) :]
        if not rest.strip():
            return "", rest
        lead = rest.rstrip(" ")
        return lead, rest[len(lead) :]
    if after_turn.startswith(wanted) and (
        _OPEN_TAG.search(after_turn) or not after_turn[len(wanted) :].strip()
    ):
        return "", ""
    if after_turn.split() == wanted.split():
        return "", ""
    raise UserError(
        f"The tokenizer's chat template writes {wanted!r} before an answer, and {after_turn!r} as "
        f"its generation prompt; {_REMEDY}."
    )


def _loses(role: str) -> UserError:
    return UserError(
        f"The tokenizer's chat template does not write the content of the {role} unchanged, so "
        f"the model would not see it; {_REMEDY}."
    )
