"""The console for the tables of commands."""

from __future__ import annotations

from rich.console import Console

__all__ = ["make_console"]


def make_console() -> Console:
    """Standard output; 120 columns where it is not a terminal, so that tables are not cut at 80."""
    # No markup: client ids and paths may have brackets.
    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, markup=False, width=120)
