"""The row layouts of other tools, as the two of ours: what is read, dropped and refused.

    Alpaca, LLaMA-Factory   instruction, input, output, and system, history ([[asked, said], ...])
    Dolly                   instruction, context, response
    pairs                   prompt, completion; question, answer
    ShareGPT                conversations of {"from": "human", "value": ...}, and system
    OpenAI                  messages of {"role": "user", "content": text or parts of type text}

A layout is read whole or not at all. Of the keys that it does not know, those are dropped that hold
nothing, no text, a copy of the row's text, or are named in ``METADATA`` or ``..._id``, which
describe a row. Any other key holds text that the model would not see, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexlora.errors import UserError, nearest

__all__ = ["ROLES", "in_our_layout", "is_metadata", "refuse_lost"]

ROLES = ("system", "user", "assistant")
# The keys of instruction, input and output in each layout of one question and one answer.
_PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", "", "completion"),
    ("question", "", "answer"),
)
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
METADATA = frozenset(
    [
        *("id", "idx", "index", "uid", "uuid", "hash", "source", "url", "link", "license"),
        *("author", "dataset", "split", "language", "lang", "model", "version", "date"),
        *("timestamp", "created", "created_at", "updated_at", "type", "tags", "metadata", "meta"),
        *("difficulty", "score", "rating", "quality", "weight", "annotator", "session", "subset"),
    ]
)
# False marks a bad answer.
_VERDICTS = ("label", "kto_tag")


def in_our_layout(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """``instruction``, ``input`` and ``output``, or ``messages``; and the keys they were read from.

    The second is empty for FlexLoRA's layouts. Labels are not among the keys of ``row``.

    Raises:
        UserError: keys of two layouts, or a key whose text would be lost.
    """
    if "conversations" in row:
        keys, messages = ["conversations", "system"], _shared(row, where)
    elif "messages" in row:
        keys, messages = ["messages"], row["messages"]
    elif isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        keys, messages = ["prompt", "completion"], [*row["prompt"], *row["completion"]]
    else:
        return _pair(row, where)
    contents = messages if isinstance(messages, list) else []
    texts = _strings([turn.get("content") for turn in contents if isinstance(turn, Mapping)])
    refuse_lost(row, set(keys), texts, where)
    return {"messages": messages}, _spelled(row, keys, ours=("messages",))


def refuse_lost(row: Mapping[str, Any], read: set[str], texts: Iterable[str], where: str) -> None:
    """Refuse keys whose text would be lost: not ``read``, no metadata, no copy of ``texts``.

    Raises:
        UserError: naming the keys.
    """
    said = [text.strip() for text in texts if text.strip()]
    lost = [
        key
        for key, value in row.items()
        if key not in read and not is_metadata(key) and _loses(key, value, said)
    ]
    if lost:
        names = ", ".join(repr(key) for key in lost)
        known = {key for keys in _PAIRS for key in keys} | {"system", "history", "messages"}
        hint = "" if lost[0] in known else nearest(lost[0], known - set(row))
        raise UserError(
            f"{where}: {names} would be lost, since no layout reads it beside "
            f"{', '.join(repr(key) for key in row if key in read) or 'nothing'}; rename it "
            f"or take it out.{hint}"
        )


def is_metadata(key: str) -> bool:
    """Whether the key describes the row and is no part of its text."""
    name = key.lower().strip("_").replace("-", "_")
    return name in METADATA or name.endswith("_id")


def _loses(key: str, value: object, said: Sequence[str]) -> bool:
    """Whether ``value`` holds text that ``said`` does not."""
    if key in _VERDICTS and value is False:
        return True
    for text in _strings(value):
        # A copy of a part (the prompt beside messages), or a rendering of the whole row.
        if not any(text in one for one in said) and not (said and all(s in text for s in said)):
            return True
    return False


def _strings(value: object) -> list[str]:
    """All text in a JSON value but keys, without that which is empty."""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _strings(item)]
    return []


def _pair(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """A question and its answer, with Alpaca's earlier turns as a conversation."""
    keys = next((keys for keys in _PAIRS if keys[2] in row), _PAIRS[0])
    values = dict(zip(("instruction", "input", "output"), map(row.get, keys), strict=True))
    values = {key: value for key, value in values.items() if value is not None}
    if "output" not in values:
        return values, ""  # refused by the caller, with what the row has
    earlier = ("system", "history")
    texts = _strings([*values.values(), *map(row.get, earlier)])
    refuse_lost(row, {*keys, *earlier}, texts, where)
    spelled = _spelled(row, [*keys, *earlier], ours=_PAIRS[0])
    if any(row.get(key) for key in earlier):
        return {"messages": _after_history(row, values, where)}, spelled
    return values, spelled


def _after_history(
    row: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> list[dict[str, Any]]:
    asked = [values.get(key) for key in ("instruction", "input")]
    turns = [("system", row["system"])] if row.get("system") else []
    for question, answer in _history(row.get("history") or [], where):
        turns += [("user", question), ("assistant", answer)]
    turns += [
        ("user", "\n".join(text for text in asked if isinstance(text, str) and text)),
        ("assistant", values["output"]),
    ]
    return [{"role": role, "content": content} for role, content in turns]


def _spelled(row: Mapping[str, Any], keys: Sequence[str], *, ours: Sequence[str]) -> str:
    """The keys that the row was read from; empty for FlexLoRA's layouts."""
    read = [key for key in keys if row.get(key)]
    return "" if all(key in ours for key in read) else ", ".join(read)


def _history(turns: object, where: str) -> list[tuple[str, str]]:
    if isinstance(turns, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        for pair in turns
    ):
        return [(question, answer) for question, answer in turns]
    raise UserError(
        f"{where}: 'history' is not a list of [question, answer] pairs of text; write the earlier "
        "turns so, or as 'messages'."
    )


def _shared(row: Mapping[str, Any], where: str) -> object:
    """ShareGPT's turns in OpenAI's words, after the system text."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, *(_spoken(turn, n, where) for n, turn in enumerate(turns, 1))]


def _spoken(turn: Mapping[str, Any], number: int, where: str) -> dict[str, Any]:
    if "from" not in turn:
        return dict(turn)
    speaker = turn["from"]
    if speaker not in _SPEAKERS:
        hint = nearest(speaker, _SPEAKERS) if isinstance(speaker, str) else ""
        raise UserError(
            f"{where}: turn {number} of 'conversations' is from {speaker!r}, expected one of "
            f"{', '.join(_SPEAKERS)}; tool calls are not trained on.{hint}"
        )
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": _SPEAKERS[speaker], "content": turn.get("value"), **others}
