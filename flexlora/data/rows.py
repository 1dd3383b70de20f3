"""One row of federated text, validated when it is read.

Two shapes are accepted, as JSON objects:

    {"instruction"?, "input"?, "output", "client"?, "task"?, "category"?}
    {"messages": [{"role", "content"}, ...], "client"?, "task"?, "category"?}

In a chat row the last message is the assistant's and is what the model learns. ``null`` means
absent. Other keys are ignored unless one resembles a missing key: training without inputs because
their key was ``"inputs"`` would not show in the loss.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from flexlora.errors import UserError, nearest

__all__ = ["ROLES", "Row", "parse_row"]

ROLES = ("system", "user", "assistant")
_TEXT_KEYS = ("instruction", "input", "output")
_LABEL_KEYS = ("client", "task", "category")
_KEYS = (*_TEXT_KEYS, *_LABEL_KEYS, "messages")


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
    if "messages" in present:
        messages = _messages(present, where)
        return Row(output=messages[-1][1], messages=messages, **labels)
    if "output" not in present:
        found = ", ".join(repr(key) for key in present) or "nothing"
        raise UserError(
            f"{where}: the row has no output (it has {found}); give it an 'output' text, "
            "or 'messages' that end with the assistant's."
        )
    texts = {key: _text(present[key], f"'{key}'", where) for key in _TEXT_KEYS if key in present}
    if not texts["output"].strip():
        raise UserError(
            f"{where}: 'output' is empty, expected the text to learn; fill it in or take "
            "the row out."
        )
    return Row(**texts, **labels, messages=None)


def _messages(present: dict, where: str) -> tuple[tuple[str, str], ...]:
    """The checked turns of a chat row: at least one, then the assistant's answer."""
    clash = [key for key in _TEXT_KEYS if key in present]
    if clash:
        raise UserError(
            f"{where}: the row has both 'messages' and '{clash[0]}', expected one shape; "
            "move the text into the messages or take one of them out."
        )
    turns = present["messages"]
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
    return messages


def _message(turn: object, number: int, where: str) -> tuple[str, str]:
    """The role and content of one turn."""
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise UserError(
            f'{where}: message {number} is not of the form {{"role": "...", "content": "..."}}; '
            "rename its keys to these two."
        )
    role = turn["role"]
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise UserError(
            f"{where}: message {number} has the role {role!r}, expected one of "
            f"{', '.join(ROLES)}.{hint}"
        )
    return role, _text(turn["content"], f"the content of message {number}", where)


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
        if key not in _KEYS and difflib.get_close_matches(key, missing, n=1, cutoff=0.75):
            raise UserError(
                f"{where}: unknown key '{key}', expected {', '.join(_KEYS)}; rename it or take "
                f"it out.{nearest(key, missing)}"
            )


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number")
