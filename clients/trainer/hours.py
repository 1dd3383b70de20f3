"""The hours in which a node works: spans of local time, like ``22:00-06:00, 12:00-13:00``.

A span that ends at or before its beginning goes on to the next day. Its end is not in it.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from flexlora.errors import UserError

__all__ = ["Hours"]

SPAN = re.compile(r"\s*(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})\s*")


@dataclass(frozen=True, kw_only=True)
class Hours:
    """``spans`` are minutes of the day, from and to; none means always."""

    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str, key: str) -> Hours:
        """
        Raises:
            UserError: anything but spans of hours and minutes, separated by commas.
        """
        if not text.strip():
            return cls()
        spans = []
        for part in text.split(","):
            found = SPAN.fullmatch(part)
            numbers = [int(number) for number in found.groups()] if found else []
            if not found or numbers[0] > 24 or numbers[2] > 24 or max(numbers[1::2]) > 59:
                raise UserError(
                    f"{key} is '{text}', expected spans of local time like '22:00-06:00' or "
                    "'22:00-06:00, 12:00-13:00'."
                )
            first, last = numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]
            spans.append((first, last))
        return cls(text=text.strip(), spans=tuple(spans))

    def has(self, seconds: float) -> bool:
        """Whether the time in seconds since 1970 is in one of the spans, by this machine's zone."""
        at = time.localtime(seconds)
        minute = at.tm_hour * 60 + at.tm_min
        return not self.spans or any(
            first <= minute < last if first < last else minute >= first or minute < last
            for first, last in self.spans
        )
