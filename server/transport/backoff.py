"""Exponential back-off, in the seconds between two copies or the rounds between two questions."""

from __future__ import annotations

__all__ = ["backoff"]


def backoff(failures: int, longest: int) -> int:
    """1, 2, 4 ... after the first, second, third failure in a row, at most ``longest``."""
    return min(longest, 2 ** min(failures - 1, longest.bit_length()))
