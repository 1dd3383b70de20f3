"""The errors that have a reader: a person who mistyped, a script, a server with a bad update."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "RunFailed",
    "TooFewNodes",
    "TooFewUpdates",
    "UpdateRefused",
    "UserError",
    "nearest",
    "one_line",
    "reason",
]


class UserError(ValueError):
    """A user's mistake in one sentence: what arrived, what was expected, what to do.

    The command line prints the sentence and exits with status 2, without a traceback.
    """


class TooFewNodes(UserError):
    """Fewer nodes than a run needs came in time; the same run may find them later."""


class RunFailed(RuntimeError):
    """A run that came to its end and trained nothing, with the cause in one sentence.

    The command line prints the sentence and exits with status 1; Flower marks such a run as failed.
    """


class TooFewUpdates(RunFailed):
    """A run that ends since too many rounds in a row were skipped; resumed, it may find more."""


class UpdateRefused(ValueError):
    """An update that must not reach the sum; the message is the cause in ``clients.csv``."""


def one_line(error: BaseException) -> str:
    """A cause in one line: a user's mistake as it is, anything else with its type."""
    if isinstance(error, UserError):
        return (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {_first(error)}"


def reason(error: BaseException) -> str:
    """The first line of a library's error message, without its type."""
    return _first(error) or type(error).__name__


def _first(error: BaseException) -> str:
    """The first line, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known name closest to ``name``, or the empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
