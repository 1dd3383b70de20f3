"""A recorded availability: ``population.availability=trace``, ``population.trace=FILE.csv``.

One row per interval in which a client could be reached, in seconds from the trace's start:

    client_id,start_seconds,end_seconds
    phone_1,0,5400
    phone_1,80000,86400

The trace begins anew after its last end, of any client, so that clients keep their places beside
one another; an interval that ends there and one that starts at 0 are one. Intervals of a client
that overlap are one, too.

A trace names this run's clients, or it names none of them: recordings have other ids.
Then the clients, sorted, are given the trace's, sorted, one by one and again from
the first. Naming some of the clients and not all is a mistake, and refused.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flexlora.config.paths import read_text
from flexlora.errors import UserError, nearest

__all__ = ["Trace", "read_trace", "state_at"]

COLUMNS = ("client_id", "start_seconds", "end_seconds")
Intervals = list[tuple[float, float]]


def state_at(windows: Iterable[tuple[float, float]], seconds: float) -> tuple[bool, float]:
    """Whether a window ``[start, end)`` is open at ``seconds``, and when that next changes.

    Windows come in order and none is empty; two that touch are one. The first may not start after
    the one that ``seconds`` is in.
    """
    open_until = -math.inf
    for start, end in windows:
        if open_until > seconds and start > open_until:
            return True, open_until
        if open_until <= seconds < start:
            return False, start
        open_until = end
    return open_until > seconds, open_until if open_until > seconds else math.inf


class Trace:
    """Answers as ``availability.Availability`` does, from intervals by client.

    Raises:
        UserError: intervals for some of the clients and not for all.
    """

    def __init__(self, intervals: Mapping[str, Intervals], client_ids: Sequence[str]) -> None:
        self.period = max(end for of_client in intervals.values() for _, end in of_client)
        named = _named(intervals, sorted(client_ids))
        self._merged = {name: _merged(of_client) for name, of_client in intervals.items()}
        self._of = {client_id: self._merged[name] for client_id, name in named.items()}

    def online(self, client_id: str, seconds: float) -> bool:
        return self._state(client_id, seconds)[0]

    def changes_at(self, client_id: str, seconds: float) -> float:
        return self._state(client_id, seconds)[1]

    def _state(self, client_id: str, seconds: float) -> tuple[bool, float]:
        if self._of[client_id] == [(0.0, self.period)]:
            return True, math.inf
        return state_at(self._windows(client_id, seconds), seconds)

    def _windows(self, client_id: str, seconds: float) -> Iterator[tuple[float, float]]:
        """From the turn before, since ``turn * period`` may round to after ``seconds``."""
        turn = int(seconds // self.period) - 1
        while True:
            for start, end in self._of[client_id]:
                # The last end is the next turn's start to the last bit, so that they touch.
                last = (turn + 1) * self.period
                yield (
                    turn * self.period + start,
                    turn * self.period + end if end < self.period else last,
                )
            turn += 1


def _named(intervals: Mapping[str, Intervals], ordered: Sequence[str]) -> dict[str, str]:
    """Which of the trace's clients each of ours follows."""
    missing = [client_id for client_id in ordered if client_id not in intervals]
    if not missing:
        return {client_id: client_id for client_id in ordered}
    if len(missing) < len(ordered):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"population.trace names {len(ordered) - len(missing)} of the {len(ordered)} clients "
            f"and has no row for '{missing[0]}'{more}; add theirs, or name none of the clients, "
            f"so that the trace is dealt to them in order.{nearest(missing[0], intervals)}"
        )
    names = sorted(intervals)
    return {client_id: names[k % len(names)] for k, client_id in enumerate(ordered)}


def _merged(intervals: Intervals) -> Intervals:
    """In order, and those that overlap or touch as one."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def read_trace(path: str) -> dict[str, Intervals]:
    """The intervals of every client in the file, in its order.

    Raises:
        UserError: no file, one that cannot be read, a column that is absent, a row that is not an
            interval of seconds from 0 on, no rows.
    """
    if not path:
        raise UserError(
            "population.availability is 'trace' and population.trace is empty, expected a CSV file "
            f"with the columns {', '.join(COLUMNS)}."
        )
    lines = read_text(path, "population.trace").splitlines()
    try:
        reader = csv.DictReader(lines, skipinitialspace=True)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise UserError(
                f"population.trace '{path}' has no column {missing[0]}, expected "
                f"{', '.join(COLUMNS)} in its first line."
            )
        intervals: dict[str, Intervals] = {}
        for row in reader:
            where = f"population.trace '{path}' line {reader.line_num}"
            intervals.setdefault((row["client_id"] or "").strip(), []).append(_interval(where, row))
    except csv.Error as error:
        raise UserError(f"population.trace '{path}' cannot be read: {error}.") from None
    if not intervals:
        raise UserError(f"population.trace '{path}' has no rows, expected one for each interval.")
    return intervals


def _interval(where: str, row: Mapping[str, str | None]) -> tuple[float, float]:
    start, end = (row[name] or "" for name in COLUMNS[1:])
    try:
        interval = float(start), float(end)
    except ValueError:
        interval = math.nan, math.nan
    if not (row["client_id"] or "").strip():
        raise UserError(f"{where}: there is no client_id, expected the name of a client.")
    if not 0 <= interval[0] < interval[1] < math.inf:
        raise UserError(
            f"{where}: the interval is from '{start}' to '{end}', expected seconds of which the "
            "first is at least 0 and the second is later."
        )
    return interval
