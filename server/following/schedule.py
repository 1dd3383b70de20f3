"""When the next run of a federation starts: ``[tool.flexlora.schedule]`` of its ``pyproject.toml``.

    every = "1d"                  a new run that long after the last one was to start
    after = "02:00"               at that time of the day, or: "NAME finished", once the federation
                                  NAME of this server has finished a run since
    start-from = "adapter"        from what the last finished run learned; "base" begins anew

Without ``every`` there is one run, and ``after`` says what it waits for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from flexlora.errors import UserError, nearest

__all__ = ["Schedule"]

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_EVERY = re.compile(r"(\d{1,4})([mhdw])")
_TIME = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")
_FINISHED = re.compile(r"(\S+) finished")
ADAPTER, BASE = "adapter", "base"
# A day has 23 or 25 hours twice a year: a time of the day may come this much before the period.
SLACK_SECONDS = 7200.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """``every`` in seconds (0: one run), the time of the day or the federation to wait for."""

    every: float = 0.0
    time_of_day: tuple[int, int] | None = None
    after: str = ""
    start_from: str = BASE

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Schedule:
        """
        Raises:
            UserError: an unknown key, or a value that is none of the above.
        """
        known = ("every", "after", "start-from")
        for key in table:
            if key not in known:
                raise UserError(f"unknown key 'schedule.{key}'.{nearest(key, known)}")
        every, after = str(table.get("every", "")), str(table.get("after", ""))
        start_from = str(table.get("start-from", BASE))
        period = _EVERY.fullmatch(every)
        if every and (period is None or int(period[1]) == 0):
            raise UserError(
                f"schedule.every is '{every}', expected a number and m, h, d or w, such as 1d."
            )
        time, finished = _TIME.fullmatch(after), _FINISHED.fullmatch(after)
        if after and not (time or finished):
            raise UserError(
                f"schedule.after is '{after}', expected a time such as 02:00, or NAME finished."
            )
        if start_from not in (ADAPTER, BASE):
            raise UserError(
                f"schedule.start-from is '{start_from}', expected {ADAPTER} or {BASE}."
                f"{nearest(start_from, (ADAPTER, BASE))}"
            )
        return cls(
            every=int(period[1]) * _UNITS[period[2]] if period else 0.0,
            time_of_day=(int(time[1]), int(time[2])) if time else None,
            after=finished[1] if finished else "",
            start_from=start_from,
        )

    def next_start(self, now: float, planned: float) -> float:
        """When to start, in seconds since the epoch; ``planned``: when the last was to (0: none).

        A start that was missed, as the last run took longer or the server was off, is now.
        """
        earliest = planned + self.every if planned else now
        if self.time_of_day is None:
            return max(earliest, now)
        if planned:
            earliest = max(earliest - SLACK_SECONDS, planned + 60.0)
        moment = self._at_time(earliest)
        return moment if not planned or moment >= now else now

    def _at_time(self, earliest: float) -> float:
        """The first moment from ``earliest`` on at the time of the day, on this machine's clock."""
        assert self.time_of_day is not None
        hour, minute = self.time_of_day
        day = datetime.fromtimestamp(earliest)
        moment = day.replace(hour=hour, minute=minute, second=0, microsecond=0)
        if moment.timestamp() < earliest:
            moment += timedelta(days=1)
        return moment.timestamp()
