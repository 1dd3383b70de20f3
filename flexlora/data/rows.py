"""One row of federated text, validated when it is read.

Two shapes are accepted, as JSON objects, and what ``layouts.py`` turns into them:

    {"instruction"?, "input"?, "output", "client"?, "task"?, "category"?}
    {"messages": [{"role", "content"}, ...], "client"?, "task"?, "category"?}

In a chat row the last message is the assistant's and is what the model learns. ``null`` means
absent. A key that is not read is refused where it resembles a missing one, or holds text that the
model would not see.

What an evaluation reads beside the text (``scored_rows.py``): ``choices`` and their ``answer`` make
a row multiple choice, and a ``pattern`` is a regular expression that a generated answer passes.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from flexlora.data.layouts import ROLES, in_our_layout, is_metadata, refuse_lost
from flexlora.data.scored_rows import PATTERN, checked_pattern, with_right_choice
from flexlora.errors import UserError, nearest

__all__ = ["ROLES", "Row", "parse_row"]

_TEXT_KEYS = ("instruction", "input", "output")
_LABEL_KEYS = ("client", "task", "category")
_KEYS = (*_TEXT_KEYS, *_LABEL_KEYS, "messages", "choices", PATTERN)


@dataclass(frozen=True, kw_only=True)
class Row:
    """An instruction row, or a chat row when ``messages`` is set.

    A chat row has no instruction and no input; its ``output`` is the last message's content.
    """

    instruction: str = ""
    input: str = ""
    output: str
    client: str | None = None
    task: str | None = None
    category: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None  # (role, content), the assistant's last
    choices: tuple[str, ...] | None = None  # of a multiple-choice row; ``output`` is one of them
    pattern: str | None = None  # regular expression that a generated answer passes
    layout: str = field(default="", compare=False)  # the keys it was read from, if not ours


def parse_row(obj: object, where: str) -> Row:
    """The row in a JSON value; ``where`` ("train.jsonl line 12") begins every error.

    Numbers are accepted as ``client``, ``task`` and ``category`` and become text (17 is "17").

    Raises:
        UserError: not an object, no output or an empty one, a value of the wrong type, both
            shapes in one row, or a key that looks like a misspelling of a missing one.
    """
    if not isinstance(obj, dict):
        raise UserError(
            f"{where}: found {_kind(obj)}, expected one JSON object such as "
            '{"instruction": "...", "output": "..."} on each line.'
        )
    present = {key: value for key, value in obj.items() if value is not None}
    _refuse_misspelt(present, where)
    labels = {key: _label(present[key], key, where) for key in _LABEL_KEYS if key in present}
    rest = {key: value for key, value in present.items() if key not in (*_LABEL_KEYS, PATTERN)}
    if "messages" in present:
        _refuse_both(present, where)
    pattern = checked_pattern(present.get(PATTERN), where)
    rest, choices = with_right_choice(rest, where)
    read, layout = in_our_layout(rest, where)
    more: dict[str, Any] = {**labels, "choices": choices, "pattern": pattern, "layout": layout}
    if "messages" in read:
        messages = _messages(read["messages"], where)
        return Row(output=messages[-1][1], messages=messages, **more)
    if "output" not in read:
        found = ", ".join(repr(key) for key in present) or "nothing"
        raise UserError(
            f"{where}: the row has no output (it has {found}); give it an 'output' text, "
            "or 'messages' that end with the assistant's."
        )
    texts = {key: _text(value, f"'{key}'", where) for key, value in read.items()}
    if not texts["output"].strip():
        raise UserError(
            f"{where}: 'output' is empty, expected the text to learn; fill it in or take "
            "the row out."
        )
    return Row(**(more | texts))


def _refuse_both(present: dict, where: str) -> None:
    clash = [key for key in (*_TEXT_KEYS, "choices") if key in present]
    if clash:
        raise UserError(
            f"{where}: the row has both 'messages' and '{clash[0]}', expected one shape; "
            "move the text into the messages or take one of them out."
        )


def _messages(turns: object, where: str) -> tuple[tuple[str, str], ...]:
    """The checked turns of a chat row: at least one, then the assistant's answer."""
    if not isinstance(turns, list):
        raise UserError(
            f"{where}: 'messages' is {_kind(turns)}, expected a list of "
            '{"role": "...", "content": "..."}.'
        )
    messages = tuple(_message(turn, number, where) for number, turn in enumerate(turns, start=1))
    if len(messages) < 2 or messages[-1][0] != "assistant" or not messages[-1][1].strip():
        roles = ", ".join(role for role, _ in messages) or "none"
        raise UserError(
            f"{where}: 'messages' has the roles {roles}, expected at least one turn and then "
            "the assistant's with text, since the last message is what the model learns."
        )
    if turns[-1].get("weight") == 0:  # as in OpenAI's files: not to be learned
        raise UserError(
            f"{where}: the last message has the weight 0, but it is what the model learns; end the "
            "row at an answer to learn."
        )
    return messages


def _message(turn: object, number: int, where: str) -> tuple[str, str]:
    """The role and content of one turn."""
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise UserError(
            f'{where}: message {number} is not of the form {{"role": "...", "content": "..."}}; '
            "rename its keys to these two."
        )
    role = "system" if turn["role"] == "developer" else turn["role"]
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise UserError(
            f"{where}: message {number} has the role {role!r}, expected one of "
            f"{', '.join(ROLES)}.{hint}"
        )
    refuse_lost(turn, {"role", "content"}, [], f"{where}: message {number}")
    return role, _content(turn["content"], f"the content of message {number}", where)


def _content(value: object, name: str, where: str) -> str:
    """Text, or the text of a list of parts ``{"type": "text", "text": ...}``."""
    if not isinstance(value, list):
        return _text(value, name, where)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise UserError(
                f"{where}: {name} has a part of type {kind!r}, expected parts of type 'text' only; "
                "the model is trained on text."
            )
    return "".join(_text(part.get("text"), name, where) for part in value)


def _text(value: object, name: str, where: str) -> str:
    """``value`` if it is text that UTF-8 can encode (JSON allows half a surrogate pair)."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {_kind(value)}, expected text; put it in quotes.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {name} holds half of a surrogate pair, expected valid Unicode; "
            "write the file again as UTF-8."
        ) from None
    return value


def _label(value: object, key: str, where: str) -> str:
    """The name of a client, task or category; a whole number becomes text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = _text(value, f"'{key}'", where)
    if not text.strip():
        raise UserError(f"{where}: '{key}' is empty, expected a name; leave the key out instead.")
    return text


def _refuse_misspelt(present: dict, where: str) -> None:
    missing = [key for key in _KEYS if key not in present]
    for key in present:
        if key in _KEYS or is_metadata(key):
            continue
        if difflib.get_close_matches(key, missing, n=1, cutoff=0.75):
            raise UserError(
                f"{where}: unknown key '{key}', expected {', '.join(_KEYS)}; rename it or take "
                f"it out.{nearest(key, missing)}"
            )


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number")
