"""Bytes and seconds as text: ``8GiB`` is read, ``1.2 MB`` and ``25.0 min`` are written."""

from __future__ import annotations

import re

from flexlora.errors import UserError

__all__ = ["human_bytes", "human_seconds", "parse_bytes", "with_prefix"]

UNITS = {"b": 1, "kb": 1000, "kib": 2**10, "mb": 1000**2, "mib": 2**20}
UNITS |= {"gb": 1000**3, "gib": 2**30, "tb": 1000**4, "tib": 2**40}
PREFIXES = ("", "k", "M", "G", "T", "P")
MINUTE, HOUR, DAY = 60, 3600, 86400


def parse_bytes(text: str, flag: str = "--memory") -> int:
    """``8GiB``, ``8 GB``, ``64MiB`` as a number of bytes.

    Raises:
        UserError: no number, no unit after it, or less than a byte; it names ``flag``.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]+)\s*", text)
    size = round(float(found[1]) * UNITS.get(found[2].lower(), 0)) if found else 0
    if size < 1:
        raise UserError(f"{flag} is '{text}', expected a number and a unit, like 8GiB or 500MB.")
    return size


def with_prefix(value: float, unit: str, *, digits: str = ".1f") -> str:
    """``1234567`` of ``B`` as ``1.2 MB``: powers of 1000; whole numbers below 1000 as they are."""
    power = 0
    while round(abs(value), 1) >= 1000 and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    whole = power == 0 and (unit == "B" or float(value).is_integer())
    return f"{value:{'.0f' if whole else digits}} {PREFIXES[power]}{unit}"


def human_bytes(count: float) -> str:
    """``1234567`` as ``1.2 MB``."""
    return with_prefix(count, "B")


def human_seconds(seconds: float) -> str:
    """``0.032 s``, ``61.0 s``; ``25.0 min`` from 10 minutes, ``3.5 h`` from 2 hours, then days."""
    if seconds < 10 * MINUTE:
        return f"{seconds:.2g} s" if 0 < seconds < 0.1 else f"{seconds:.1f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:.1f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:.1f} days"
