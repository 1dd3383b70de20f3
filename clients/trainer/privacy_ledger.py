"""What the uploads of a trainer have spent of its rows' privacy, by run, on disk.

    {"format": 1, "runs": {"7": [{"mechanism": {...}, "count": 3, "whole": true}, ...], ...}}

``whole``: the noise was on the upload (``privacy.mode=local``) and covers all rows together; else
on rows' gradients (``example``), where it covers any one. No run is ever forgotten: what was sent
stays sent. As with ``quotas.json`` the file is replaced atomically, before a reply leaves, and one
that cannot be read is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from flexlora.errors import UserError
from flexlora.privacy.accounting import Mechanism
from flexlora.wire.files import write_atomically

__all__ = ["PrivacyLedger", "Spent"]

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Spent:
    """A mechanism, how often it was applied, and whether its noise covers all rows together."""

    mechanism: Mechanism
    count: int
    whole: bool


class PrivacyLedger:
    """The ledger of one trainer, in ``path``.

    Raises:
        UserError: a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runs: dict[str, list[Spent]] = {}
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from None
        try:
            self._runs = _decoded(data)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, UserError):
            raise self._refused("it is damaged") from None

    def add(self, run: str, spent: Spent) -> None:
        """Enter one round of ``run``, and write the file.

        Raises:
            OSError: it cannot be written; nothing is entered then, and nothing may leave.
        """
        known = list(self._runs.get(run, []))
        alike = [s for s in known if (s.mechanism, s.whole) == (spent.mechanism, spent.whole)]
        count = spent.count + sum(s.count for s in alike)
        others = [s for s in known if s not in alike]
        merged = Spent(mechanism=spent.mechanism, count=count, whole=spent.whole)
        runs = {**self._runs, run: [*others, merged]}
        listed = {name: [asdict(s) for s in rows] for name, rows in runs.items()}
        write_atomically(self.path, json.dumps({"format": FORMAT, "runs": listed}).encode())
        self._runs = runs

    def spent(self, run: str | None = None) -> list[Spent]:
        """What one run has spent, or all."""
        runs: Iterable[list[Spent]] = self._runs.values()
        if run is not None:
            runs = [self._runs.get(run, [])]
        return [spent for rows in runs for spent in rows]

    def _refused(self, why: str) -> UserError:
        return UserError(
            f"the privacy ledger '{self.path}' cannot be read: {why}; it says how much noise has "
            "covered what this node sent, so the trainer does not start without it. Remove it to "
            "count from nothing."
        )


def _decoded(data: bytes) -> dict[str, list[Spent]]:
    held = json.loads(data)
    if held["format"] != FORMAT:
        raise ValueError("another format")
    return {run: [_spent(row) for row in rows] for run, rows in held["runs"].items()}


def _spent(row: dict) -> Spent:
    count, whole = row["count"], row["whole"]
    if type(count) is not int or count < 1 or type(whole) is not bool:
        raise ValueError("not an entry")
    return Spent(mechanism=Mechanism(**row["mechanism"]), count=count, whole=whole)
