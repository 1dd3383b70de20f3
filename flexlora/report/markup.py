"""HTML that is escaped by construction.

``Markup`` is inserted into a page unchanged; ``text`` escapes any other value. The type checker
rejects a plain string where markup is expected.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import NewType

from flexlora.report.style import CSS

__all__ = ["Markup", "data", "document", "element", "joined", "name", "table", "text"]

Markup = NewType("Markup", str)

# Characters that HTML does not allow, and those that change the direction of text.
_REPLACED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e]")


def text(value: object) -> Markup:
    """Any text, escaped for an element and for an attribute alike."""
    return Markup(html.escape(_REPLACED.sub("\ufffd", str(value)), quote=True))


def joined(parts: Iterable[Markup], between: str = "") -> Markup:
    return Markup(text(between).join(parts))


def element(tag: str, *content: Markup, **attributes: str) -> Markup:
    """``<tag attributes>content</tag>``; a trailing underscore of an attribute is dropped."""
    spelled = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items()
    )
    return Markup(f"<{tag}{spelled}>{''.join(content)}</{tag}>")


def name(value: object) -> Markup:
    """An external name, isolated so that right-to-left letters do not reorder other text."""
    return element("bdi", text(value))


def data(value: float | None, shown: str, *, derived: bool = False) -> Markup:
    """A formatted number, with the exact one as an attribute for programs.

    ``derived`` marks a sum or a count; any other number is in a file of the run.
    """
    if value is None:
        return Markup("")
    kind = {"class_": "derived"} if derived else {}
    return element("data", text(shown), value=repr(value), **kind)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[Markup]],
    *,
    caption: str,
    words: int = 1,
    note: bool = False,
) -> Markup:
    """A table whose first ``words`` columns are text and whose others are numbers.

    The first cell of a row is its header. ``caption`` is read aloud; as a ``note`` it is shown too.
    """
    kinds = ["words" if column < words else "number" for column in range(len(header))]
    head = joined(
        element("th", text(title), scope="col", class_=kind)
        for title, kind in zip(header, kinds, strict=True)
    )
    body = joined(element("tr", *_cells(row, kinds)) for row in rows)
    title = element("caption", text(caption), **({} if note else {"class_": "unseen"}))
    whole = element("table", title, element("thead", element("tr", head)), element("tbody", body))
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cells(row: Sequence[Markup], kinds: Sequence[str]) -> Iterable[Markup]:
    for place, (cell, kind) in enumerate(zip(row, kinds, strict=True)):
        if place:
            yield element("td", cell, class_=kind)
        else:
            yield element("th", cell, scope="row", class_=kind)


def document(title: str, *body: Markup) -> Markup:
    """A whole page with a policy that forbids loading anything and running scripts."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return Markup(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )
