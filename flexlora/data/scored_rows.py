"""What a row says of its evaluation: choices with the right one, and a pattern to pass.

    {"instruction"?, "input"?, "choices": ["...", ...], "answer": place from 0, or the text}
    {"question" or "prompt", "choices", "answer"}

The right choice is the row's output, so that such a row is learned like any other. With choices
``answer`` is never the text to learn itself, as in the layout of ``question`` and ``answer``.
"""

from __future__ import annotations

import re
from typing import Any

from flexlora.errors import UserError, nearest

__all__ = ["PATTERN", "checked_pattern", "with_right_choice"]

PATTERN = "pattern"
# The key of the text to learn beside each key of a prompt.
_OUTPUTS = {"question": "answer", "prompt": "completion", "context": "response"}


def checked_pattern(value: object, where: str) -> str | None:
    """A regular expression as Python's ``re`` takes it; None for None.

    Raises:
        UserError: no text, or none that can be compiled.
    """
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise UserError(
            f"{where}: '{PATTERN}' is {value!r}, expected a regular expression in quotes, as "
            "'\\\\bparis\\\\b'."
        )
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"{where}: '{PATTERN}' is {value!r}, which is no regular expression ({error}); put a "
            "backslash before characters that are meant literally."
        ) from None
    return value


def with_right_choice(
    row: dict[str, Any], where: str
) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """The row with the right choice as its output, and the choices; without choices, the row.

    Raises:
        UserError: fewer than two distinct texts, no answer, or one that is not among the choices.
    """
    if "choices" not in row:
        return row, None
    choices = _choices(row["choices"], where)
    given = [key for key in ("answer", "output") if key in row]
    if not given:
        raise UserError(
            f"{where}: the row has 'choices' and no 'answer', expected the place of the right "
            "choice (from 0) or its text; add it."
        )
    if len(given) == 2:
        raise UserError(
            f"{where}: the row has 'choices', 'answer' and 'output', expected one of the last two; "
            "take the other out."
        )
    rest = {key: value for key, value in row.items() if key not in ("choices", *given)}
    output = next((out for key, out in _OUTPUTS.items() if key in rest), "output")
    return {**rest, output: choices[_place(row[given[0]], given[0], choices, where)]}, choices


def _choices(value: object, where: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list | tuple) else ()
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(
            f"{where}: 'choices' is {_short(value)}, expected a list of at least two texts; "
            "write the choices so."
        )
    stripped = [text.strip() for text in texts]
    twice = next((text for text in stripped if stripped.count(text) > 1), None)
    if twice is not None:
        raise UserError(
            f"{where}: the choice {twice!r} is there twice, expected different choices; take one "
            "of them out."
        )
    return tuple(texts)


def _place(answer: object, key: str, choices: tuple[str, ...], where: str) -> int:
    """The index of the right choice, from its place or its text."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise UserError(
            f"{where}: '{key}' is {answer}, expected a place from 0 to {len(choices) - 1}, since "
            f"the row has {len(choices)} choices."
        )
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    hint = nearest(answer, choices) if isinstance(answer, str) else ""
    raise UserError(
        f"{where}: '{key}' is {_short(answer)}, which is not among the choices, expected the text "
        f"of one of them or its place from 0 as a number.{hint}"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
