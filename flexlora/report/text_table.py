"""Plain-text tables: columns that do not fit follow in further blocks, with the first repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len

__all__ = ["text_table"]

GAP = "  "


def text_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int,
    words: Sequence[bool] = (),
) -> Iterator[str]:
    """The lines of the table; only a block of one column may be wider than ``width``.

    ``words`` is True for left-aligned columns; the others, and those beyond it, are right-aligned.
    """
    table = [header, *rows]
    widths = [max(cell_len(row[c]) for row in table) for c in range(len(header))]
    left = [*words, *(False for _ in header[len(words) :])]
    for number, block in enumerate(_blocks(widths, width)):
        if number:
            yield ""
        for row in table:
            cells = (_padded(row[c], widths[c], left=left[c]) for c in block)
            yield GAP.join(cells).rstrip()


def _blocks(widths: Sequence[int], width: int) -> list[list[int]]:
    """Column indices by block; every block begins with column 0."""
    blocks: list[list[int]] = [[0]]
    used = widths[0]
    for column in range(1, len(widths)):
        needed = len(GAP) + widths[column]
        if used + needed > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(column)
        used += needed
    return blocks


def _padded(cell: str, width: int, *, left: bool) -> str:
    room = " " * (width - cell_len(cell))
    return cell + room if left else room + cell
