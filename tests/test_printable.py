"""Words of other machines: one line that prints, no formula, and back again."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexlora.printable import from_cell, is_name, printable, to_cell

ANY = st.text(st.characters(exclude_categories=[]), max_size=40)


@given(ANY)
def test_what_is_shown_prints_and_what_prints_is_untouched(text):
    shown = printable(text)
    assert shown.isprintable() and (shown == text) == text.isprintable()
    assert printable(shown) == shown


@given(ANY)
def test_a_cell_is_read_back_as_the_printable_text(text):
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerow([to_cell(text), "end"])
    assert table.getvalue().count("\n") == 1
    ((cell, _),) = csv.reader([table.getvalue()])
    assert from_cell(cell) == printable(text)
    assert not cell.startswith(tuple("=+-@\t\r\n"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("one\ntwo\tthree\u2028four", "one two three four"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        ("Zoë 東京", "Zoë 東京"),
    ],
)
def test_escapes_are_spelled(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\uff1d1", "'=1", "''"])
def test_formulas_get_a_quote_and_other_cells_do_not(text):
    assert to_cell(text) == "'" + text and from_cell("'" + text) == text
    assert to_cell("client's = 1") == "client's = 1" and to_cell("") == ""
    assert from_cell("'quoted'") == "'quoted'", "a table of an older version"


def test_what_is_cut_says_how_long_it_was():
    assert printable("x" * 10, 4) == "xxxx... (10 characters)" and printable("xxxx", 4) == "xxxx"


def test_names():
    assert is_name("a") and is_name("site/7 b") and is_name("x" * 128)
    assert not any(map(is_name, ("", "x" * 129, "a\nb", "a\x00", "\u202ea")))
