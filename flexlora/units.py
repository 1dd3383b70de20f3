"""Bytes as people write them: ``8GiB`` in, ``1.2 MB`` out."""

from __future__ import annotations

import re

from flexlora.errors import UserError

__all__ = ["human_bytes", "parse_bytes"]

UNITS = {"b": 1, "kb": 1000, "kib": 2**10, "mb": 1000**2, "mib": 2**20}
UNITS |= {"gb": 1000**3, "gib": 2**30, "tb": 1000**4, "tib": 2**40}


def parse_bytes(text: str, flag: str = "--memory") -> int:
    """``8GiB``, ``8 GB``, ``64MiB`` as bytes.

    Raises:
        UserError: no number, no unit after it, or less than a byte; it names ``flag``.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]+)\s*", text)
    size = round(float(found[1]) * UNITS.get(found[2].lower(), 0)) if found else 0
    if size < 1:
        raise UserError(f"{flag} is '{text}', expected a number and a unit, like 8GiB or 500MB.")
    return size


def human_bytes(count: float) -> str:
    """``1234567`` as ``1.2 MB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
