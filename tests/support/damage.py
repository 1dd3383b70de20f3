"""Seeded damage to files from outside: bytes, JSON values, tables. Shared by the tests of readers.

``check_reader`` is the law that they all keep: whatever is in the file, a reader returns or ends in
its own refusal, in one line.
"""

from __future__ import annotations

import copy
import json
import random
import traceback
from pathlib import Path

from flexlora.errors import UserError

__all__ = ["check_reader", "damaged_bytes", "damaged_json", "damaged_value", "mutations"]

STRANGE = [
    None, True, False, 0, -1, 1, 3, 2**63, 10**40, 10**400, 0.0, -0.5, 1.5, 1e308, float("nan"),
    float("inf"), "", "4", "x", "\0", "\ud800", "é" * 40, "(", "[a", "*", "a{99999999999}",
    "(?P<idx>a)", "a|b", r"\d+", [], [None], ["x", 1], [[[]]], {}, {"x": {"y": []}}, {"": 0},
    {"(": 4}, {"q": "4"},
]  # fmt: skip


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flipped, cut, lengthened, doubled or replaced."""
    kind = draw.choice(["flip", "flip", "cut", "add", "double", "zero", "empty", "noise", "mark"])
    at = draw.randrange(len(data) + 1)
    if kind == "flip" and data:
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 8])):
            # Headers and the first records are where a reader decides.
            end = len(data) if draw.random() < 0.5 else min(len(data), 300)
            changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == "cut":
        return data[:at]
    if kind == "add":
        return data[:at] + draw.randbytes(draw.choice([1, 3, 40])) + data[at:]
    if kind == "double":
        return data[:at] + data[max(0, at - 20) :]
    if kind == "zero":
        return data[:at] + b"\0" * min(8, len(data) - at) + data[at + 8 :]
    if kind == "noise":
        return draw.randbytes(draw.choice([1, 8, 100]))
    if kind == "mark":
        return draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xff"]) + data
    return b""


def damaged_value(value: object, draw: random.Random) -> object:
    """Of another type, size or depth."""
    if draw.random() < 0.15:
        return json.loads("[" * 40 + "]" * 40)
    if draw.random() < 0.15:
        return draw.choice([[value], {"x": value}, str(value), [value, value]])
    return copy.deepcopy(draw.choice(STRANGE))


def damaged_json(tree: object, draw: random.Random, times: int = 1) -> object:
    """A copy in which ``times`` values, at any depth, are replaced, removed, moved or added."""
    tree = copy.deepcopy(tree)
    for _ in range(times):
        if not isinstance(tree, dict | list) or not tree or draw.random() < 0.03:
            return damaged_value(tree, draw)
        place = tree
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = draw.choice(list(keys))
        while isinstance(place[key], dict | list) and place[key] and draw.random() < 0.6:
            place = place[key]
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw.choice(list(keys))
        what = draw.choice(["replace", "replace", "replace", "remove", "rename", "add"])
        if what == "replace" or isinstance(place, list):
            place[key] = damaged_value(place[key], draw)
        elif what == "remove":
            del place[key]
        elif what == "rename":
            place[f"{key}{draw.choice(['x', '_', '.', ' '])}"] = place.pop(key)
        else:
            place[draw.choice(["new_field", "", "*", "é"])] = damaged_value(0, draw)
    return tree


def mutations(data: bytes, count: int, seed: int = 0):
    """``count`` damaged versions of a file's bytes; of JSON, half of them still parse."""
    draw = random.Random(seed)
    try:
        tree = json.loads(data)
    except ValueError:
        tree = None
    for _ in range(count):
        if tree is not None and draw.random() < 0.5:
            changed = damaged_json(tree, draw, draw.choice([1, 1, 2]))
            yield json.dumps(changed, ensure_ascii=draw.random() < 0.9).encode(
                errors="surrogatepass"
            )
        else:
            yield damaged_bytes(data, draw)


def check_reader(file, read, *, count=200, seed=0, refusal=UserError):
    """``read()`` with ``file`` damaged ``count`` times; returns how often it was refused.

    The file is then as it was. All that escaped is in the one error.

    Raises:
        AssertionError: exceptions other than ``refusal``, or one of several lines.
    """
    good, refused, escaped = file.read_bytes(), 0, {}
    read()
    for data in mutations(good, count, seed):
        file.write_bytes(data)
        try:
            read()
        except refusal as error:
            if "\n" in str(error):
                escaped[f"several lines: {error!r}"[:200]] = data[:300]
            refused += 1
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            escaped[f"{type(error).__name__} at {where}: {error}"[:200]] = data[:300]
    file.write_bytes(good)
    read()
    one = next(iter(escaped.values()), b"")
    assert not escaped, f"{file.name}: {len(escaped)} escaped: {list(escaped)}, one of {one!r}"
    return refused
