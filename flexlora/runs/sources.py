"""The base and the rows that a run trains on, and whether they are still the same.

The checkpoint holds a fingerprint of the base and digests of the rows, the adapters' folders the
fingerprint alone, in a file beside PEFT's two. A resume, an evaluation and a merge compare them
with what they read. An entry that is empty on either side (an older run; rows of a deployment,
which the server never sees) is not compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexlora.errors import UserError
from flexlora.wire.files import write_atomically

__all__ = ["Sources", "check_same", "read_origin", "write_origin"]

ORIGIN_FILE, FORMAT = "flexlora.json", 1


@dataclass(frozen=True, kw_only=True)
class Sources:
    """``base`` is the fingerprint, ``rows`` the digest of each split, ``tokens`` of some rows' ids.

    ``tokens`` changes with the tokenizer and its chat template, which the fingerprint of the base
    need not cover.
    """

    base: str = ""
    rows: Mapping[str, str] = field(default_factory=dict)
    tokens: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sources:
        """The inverse of ``to_dict``; entries that are not of this form are as if not there."""
        rows = values.get("rows")
        rows = rows if isinstance(rows, Mapping) else {}
        texts = {key: str(values.get(key) or "") for key in ("base", "tokens")}
        return cls(rows={str(split): str(text) for split, text in rows.items()}, **texts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, now: Sources, model: str) -> list[str]:
        """In words, what is another by ``now``, whose base is named ``model``."""
        found = []
        if self.base and now.base and self.base != now.base:
            prints = f"its fingerprint is {now.base[:12]}, it was {self.base[:12]}"
            found.append(f"the base '{model}' has changed in weights or settings ({prints})")
        for split in self.rows.keys() & now.rows.keys():
            if self.rows[split] != now.rows[split]:
                count, before = (
                    text.partition(" ")[0] for text in (now.rows[split], self.rows[split])
                )
                found.append(f"the {split} rows have changed ({count} rows, {before} before)")
        if not found and self.tokens and now.tokens and self.tokens != now.tokens:
            found.append("the same rows have other tokens: another tokenizer or chat template")
        return sorted(found)


def check_same(
    before: Sources | None, now: Sources, *, run: str, model: str, allowed: bool, flag: str
) -> str:
    """Refuse sources that have changed since; where that is ``allowed``, say what has, or nothing.

    Args:
        run: the run or the adapter, as the sentence names it.
        flag: what a person gives to go on all the same.

    Raises:
        UserError: something has changed, and it is not allowed.
    """
    found = before.differences(now, model) if before is not None else []
    if not found:
        return ""
    notice = f"{' and '.join(found)} since '{run}' was trained"
    if not allowed:
        raise UserError(f"{notice}; put back what was there, or go on with {flag}.")
    return f"{notice}: going on, as {flag} was given."


def write_origin(folder: Path, base: str) -> None:
    """The fingerprint of the base beside an adapter's PEFT files, which are as PEFT writes them."""
    text = json.dumps({"format": FORMAT, "base_fingerprint": base}, indent=1) + "\n"
    write_atomically(folder / ORIGIN_FILE, text.encode())


def read_origin(folder: Path) -> Sources | None:
    """What ``write_origin`` wrote; None for an adapter from elsewhere.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / ORIGIN_FILE
    if not file.is_file():
        return None
    try:
        return Sources(base=str(json.loads(file.read_text(encoding="utf-8"))["base_fingerprint"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"'{file}' is damaged, expected the fingerprint of the adapter's base; remove the file "
            "to use the adapter without it."
        ) from None
