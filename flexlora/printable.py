"""Text of other machines, made safe to show and to write: for terminals, logs and spreadsheets.

A client's name, its causes and what its device is called are its own words. Without this they could
be commands to a terminal, lines of a log that nobody wrote, or formulas in a spreadsheet.
"""

from __future__ import annotations

__all__ = ["from_cell", "is_name", "printable", "to_cell"]

# A spreadsheet takes a cell that begins like this as a formula; wide forms count in some locales.
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
QUOTE = "'"  # before a cell that would be one; spreadsheets do not show it
LONGEST_NAME = 128


def printable(text: str, limit: int = 0) -> str:
    """The text in one line of characters that print, at most ``limit`` of it (0: all).

    White space becomes a space and any other character that does not print its escape: ``\\x1b``.
    """
    cut = f"... ({len(text)} characters)" if 0 < limit < len(text) else ""
    kept = text[:limit] if cut else text
    if kept.isprintable():
        return kept + cut
    return "".join(map(_printable, kept)) + cut


def _printable(letter: str) -> str:
    if letter.isprintable():
        return letter
    return " " if letter.isspace() else letter.encode("unicode_escape").decode("ascii")


def is_name(text: str) -> bool:
    """Whether the text can name a client: 1 to 128 characters, all of which print."""
    return 1 <= len(text) <= LONGEST_NAME and text.isprintable()


def to_cell(text: str) -> str:
    """The text as a cell of a table: printable, and no formula."""
    shown = printable(text)
    return QUOTE + shown if shown.startswith((*FORMULA, QUOTE)) else shown


def from_cell(cell: str) -> str:
    """The inverse of ``to_cell`` for printable text."""
    quoted = cell.startswith(QUOTE) and cell[1:].startswith((*FORMULA, QUOTE))
    return cell[1:] if quoted else cell
