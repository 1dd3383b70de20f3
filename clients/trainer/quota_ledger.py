"""How much of a quota is used: seconds, requests and rows by the hour, on disk.

    {"format": 1, "hours": {"491234": [seconds, requests, rows], ...}}      hours since 1970

The file is replaced atomically, so a crash loses at most what was not yet written. One that cannot
be read is refused and not begun anew: a trainer that forgot what was used would give more than its
owner allows, and only a failing disk or a hand can damage the file. The owner may remove it.
"""

from __future__ import annotations

import json
import math
from dataclasses import astuple, dataclass
from pathlib import Path

from flexlora.errors import UserError
from flexlora.wire.files import write_atomically

__all__ = ["QuotaLedger", "Use"]

FORMAT = 1
HOUR = 3600.0
HOURS_KEPT = 1000  # by number, not by time: a clock that is wrong for a while forgets nothing


@dataclass(frozen=True, kw_only=True)
class Use:
    """Seconds of work, requests, rows that passed through training."""

    seconds: float = 0.0
    requests: int = 0
    rows: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(
            seconds=self.seconds + other.seconds,
            requests=self.requests + other.requests,
            rows=self.rows + other.rows,
        )


class QuotaLedger:
    """The use of one trainer, in ``path``.

    Raises:
        UserError: a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hours: dict[int, Use] = {}
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from None
        try:
            self._hours = _decoded(data)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            raise self._refused("it is damaged") from None

    def add(self, use: Use, now: float) -> None:
        """Count ``use`` at the time ``now`` (seconds since 1970), and write the file.

        Raises:
            OSError: it cannot be written; nothing is counted then.
        """
        hour = math.floor(now / HOUR)
        hours = {**self._hours, hour: self._hours.get(hour, Use()) + use}
        hours = dict(sorted(hours.items())[-HOURS_KEPT:])
        listed = {str(at): astuple(counted) for at, counted in hours.items()}
        text = json.dumps({"format": FORMAT, "hours": listed})
        write_atomically(self.path, text.encode())
        self._hours = hours

    def used(self, seconds: float, now: float) -> Use:
        """The use in the last ``seconds``, by whole hours, and what is ahead of ``now``."""
        first = math.floor((now - seconds) / HOUR)
        return sum((use for hour, use in self._hours.items() if hour >= first), Use())

    def _refused(self, why: str) -> UserError:
        return UserError(
            f"the quotas' file '{self.path}' cannot be read: {why}; it says how much of the "
            "owner's quotas is used, so the trainer does not start without it. Remove it to count "
            "from nothing."
        )


def _decoded(data: bytes) -> dict[int, Use]:
    held = json.loads(data)
    if held["format"] != FORMAT:
        raise ValueError("another format")
    hours = {}
    for hour, (seconds, requests, rows) in held["hours"].items():
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (requests, rows))
        if not whole or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise ValueError("not a use")
        if min(requests, rows) < 0:
            raise ValueError("less than nothing")
        hours[int(hour)] = Use(seconds=float(seconds), requests=requests, rows=rows)
    return hours
