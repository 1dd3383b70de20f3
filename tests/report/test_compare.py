"""Runs side by side: what differs in them, what came of it, and when that cannot be compared."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from flexlora.commands.cli import main
from flexlora.errors import UserError
from flexlora.report import compare
from flexlora.report.comparison import compared, read_runs
from flexlora.report.text_table import text_table
from flexlora.runs.folder import RunFolder
from pages import asked_for, client_row, numbers_on_disk, read_page, rounded, written_run


def columns(*folders):
    """``{title: cells as they are shown}`` of the table, and its notes."""
    found = compared(read_runs(folders))
    shown = {column.title: [cell.shown for cell in column.cells] for column in found.columns}
    return {"run": list(found.names), **shown}, found.notes


def printed(*folders, out=None, width=400):
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False, markup=False)
    assert compare(folders, out=out, console=console) == 0
    return text.getvalue()


@pytest.fixture
def pair(tmp_path):
    """Two methods on the same rows."""
    first = written_run(tmp_path / "one", (3.0, 2.0, 1.5))
    extra = {2: {"eval_exact_match": 0.625, "clients_failed": 3, "simulated_seconds": 700.0}}
    second = written_run(tmp_path / "two", (3.0, 1.8, 1.2), extra=extra, method__name="flexlora")
    return first, second


def test_the_table_says_what_differs_and_what_came_of_it(pair):
    table, notes = columns(*pair)
    assert table == {
        "run": ["one", "two"],
        "method.name": ["carried", "flexlora"],
        "method.server-learning-rate": ["0.0", "1.0"],
        "rounds": ["2", "2"],
        "loss": ["1.500", "1.200"],
        "exact match": ["", "0.625"],
        "down": ["3.0 MB", "3.0 MB"],
        "up": ["1.0 MB", "1.0 MB"],
        "seconds": ["3.8 s", "3.8 s"],
        "simulated": ["", "11.7 min"],
        "failures": ["0", "3"],
        "loss rank_2": ["1.500", "1.200"],
        "loss rank_4": ["1.350", "1.080"],
    }
    assert notes == ()


def test_runs_on_other_rows_are_compared_and_the_table_says_so(tmp_path, pair):
    other = written_run(tmp_path / "three", (3.3, 2.0), seed=5, eval__split="test")
    table, notes = columns(*pair, other)
    assert table["rows"] == ["A", "A", "B"] and table["loss"][2] == "2.000"
    assert any("(seed, eval.split)" in note and "one letter" in note for note in notes)


def test_rows_that_differ_under_equal_settings_are_seen_in_the_scores(tmp_path, pair):
    """Another version of the data under the same path: other clients or other numbers of rows."""
    same = written_run(tmp_path / "three", (3.0, 2.0, 1.0))
    assert "rows" not in columns(pair[0], same)[0]
    file = same / "evaluation.csv"
    file.write_text(file.read_text().replace(",4\n", ",5\n"))
    table, notes = columns(pair[0], same)
    assert table["rows"] == ["A", "B"]
    assert "evaluation.csv names other clients or other numbers of rows" in notes[0]


def test_over_other_bases_bits_per_byte_are_compared_and_the_losses_are_said_not_to_be(tmp_path):
    """The same text cut into other tokens: the run with the larger loss per token is the better."""
    bits = {2: {"eval_bits_per_byte": 1.9}}
    first = written_run(tmp_path / "one", (3.0, 2.0, 1.5), extra=bits, model__name="a")
    bits = {2: {"eval_bits_per_byte": 1.2}}
    second = written_run(tmp_path / "two", (3.0, 2.5, 2.2), extra=bits, model__name="b")
    table, notes = columns(first, second)
    assert table["bits/byte"] == ["1.900", "1.200"] and table["loss"] == ["1.500", "2.200"]
    assert "rows" not in table and len(notes) == 1
    assert "other bases (a, b): compare their bits/byte" in notes[0]
    assert columns(first, written_run(tmp_path / "three", (3.0, 2.0), model__name="a"))[1] == ()


def test_losses_per_class_are_compared_where_the_classes_agree(tmp_path, pair):
    other = written_run(tmp_path / "three", (3.0, 2.0), classes=("rank_2", "rank_16"))
    assert not [title for title in columns(pair[0], other)[0] if title.startswith("loss ")]


def test_a_run_in_progress_shows_how_far_it_is(tmp_path, pair):
    going = written_run(tmp_path / "going", (3.0, 2.0), num_server_rounds=8)
    table, notes = columns(pair[0], going)
    assert table["rounds"] == ["2", "1 of 8"] and table["loss"] == ["1.500", "2.000"]
    assert notes[-1] == "Not finished, scores so far: going."


def test_runs_are_named_by_as_much_of_their_path_as_it_takes(tmp_path):
    folders = [written_run(tmp_path / name / "run", (3.0, 2.0)) for name in ("a", "b")]
    assert columns(*folders)[0]["run"] == ["a/run", "b/run"]


def test_what_cannot_be_compared_is_refused(tmp_path, pair, capsys):
    untrained = written_run(tmp_path / "untrained", (3.0,))
    with pytest.raises(UserError, match=r"compare got one run, .*one', expected at least two"):
        read_runs(pair[:1])
    with pytest.raises(UserError, match=r"compare got .*one' twice"):
        read_runs((pair[0], pair[0]))
    with pytest.raises(UserError, match=r"is not a run folder"):
        read_runs((pair[0], tmp_path))
    with pytest.raises(UserError, match=r"untrained' has finished no round of training"):
        read_runs((pair[0], untrained))
    with pytest.raises(UserError, match=r"--out is 'page.txt', expected .* ends in .html"):
        compare(pair, out="page.txt", console=Console())
    with pytest.raises(UserError, match=r"nowhere/c.html' cannot be written: No such file"):
        compare(pair, out=tmp_path / "nowhere" / "c.html", console=Console(file=io.StringIO()))
    assert main(["compare", str(pair[0])]) == 2
    assert "expected at least two run folders" in capsys.readouterr().err


def test_the_command_prints_the_table_and_writes_the_page(pair, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert main(["compare", *map(str, pair), "--out", str(file)]) == 0
    out = capsys.readouterr().out
    settings = ["method.name", "method.server-learning-rate"]
    assert out.splitlines()[0].split()[:4] == ["run", *settings, "rounds"]
    assert f"Page: {file}" in out
    page = read_page(file)
    assert asked_for(page) == [] and len(set(page.ids())) == len(page.ids())
    assert page.table("Settings that differ") == [
        ["key", "one", "two"],
        ["method.name", "carried", "flexlora"],
        ["method.server-learning-rate", "0.0", "1.0"],
    ]


def test_every_number_of_the_page_is_in_one_of_the_runs_or_a_sum(pair, tmp_path):
    printed(*pair, out=tmp_path / "page.html")
    known = set.union(*(numbers_on_disk(folder) for folder in pair))
    page = read_page(tmp_path / "page.html")
    assert len(page.data) > 15
    for value, shown, kind in page.data:
        assert rounded(shown.partition(" of ")[0], value), (value, shown)
        assert kind == "derived" or value in known
    to_the_loss = {4e6}  # both directions; the seconds are those of the whole run
    sums = {3e6, 1e6, 3.75, 700.0, 0.0, 3.0} | to_the_loss
    assert {value for value, _, kind in page.data if kind == "derived"} == sums
    output = [re.fullmatch(r"(.+), round (\d+): ([\d.]+)", text) for text in page.said("title")]
    shown = [found[3] for found in output if found]
    assert len(shown) > 15
    assert all(any(rounded(text, value) for value in known) for text in shown)


def ticks_of(page, start):
    """The labels of the upright axis of every picture whose title's id begins with ``start``."""
    found, current = {}, None
    labels = iter([text for path, text in page.texts if path[-1] == "text"])
    for tag, attributes in page.elements:
        if tag == "title" and "id" in attributes:
            current = attributes["id"]
        if tag == "text":
            label = next(labels)
            if current.startswith(start) and attributes["text-anchor"] == "end":
                found.setdefault(current, []).append(label)
    return list(found.values())


def test_pictures_side_by_side_have_the_same_axes(pair, tmp_path):
    other = written_run(tmp_path / "three", (30.0, 25.0, 20.0, 10.0))
    printed(*pair, other, out=tmp_path / "page.html")
    found = ticks_of(read_page(tmp_path / "page.html"), "held-out-loss-")
    assert found == [["0", "10", "20", "30"]] * 3


def test_personal_scores_are_side_by_side_where_a_run_has_them(pair, tmp_path):
    printed(*pair, out=tmp_path / "page.html")
    assert "Held-out loss of each client" not in read_page(tmp_path / "page.html").said("h2")
    own = written_run(tmp_path / "own", (3.0, 2.0), extra={1: {"eval_loss/personal": 0.5}})
    printed(*pair, own, out=tmp_path / "page.html")
    assert "Held-out loss of each client" in read_page(tmp_path / "page.html").said("h2")


def test_a_rank_class_has_one_colour_in_every_run(tmp_path):
    first = written_run(tmp_path / "one", (3.0, 1.0), classes=("rank_4", "rank_8"))
    second = written_run(tmp_path / "two", (3.0, 1.0), classes=("rank_2", "rank_8"))
    printed(first, second, out=tmp_path / "page.html")
    marks = {}
    for attributes, output in read_page(tmp_path / "page.html").captions:
        if attributes.get("class", "").startswith("mark") and output.startswith("rank_"):
            marks.setdefault(output.partition(",")[0], set()).add(attributes["class"])
    assert marks == {"rank_4": {"mark s0"}, "rank_8": {"mark s1"}, "rank_2": {"mark s2"}}


def test_hostile_names_of_runs_and_settings_are_text(tmp_path):
    words = "<script>alert(1)<|script>"
    first = written_run(tmp_path / words, (3.0, 2.0), data__path="a</td><img src=x>")
    second = written_run(tmp_path / "two", (3.0, 2.0))
    row = client_row("<b>", status="failed", cause="<i>")
    RunFolder(second)._append_csv("clients.csv", [row])
    printed(first, second, out=tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    assert asked_for(page) == [] and words in page.said("bdi")
    assert any(text.startswith(words) for text in page.said("span"))


def test_columns_that_do_not_fit_go_below_and_nothing_is_cut(pair):
    wide, narrow = printed(*pair), printed(*pair, width=50)
    assert len(wide.splitlines()) == 3
    assert max(map(len, narrow.splitlines())) <= 50
    assert sorted(set(narrow.split())) == sorted(set(wide.split()))
    assert narrow.count("two") == len(re.findall(r"^run ", narrow, re.M)) > 2


CELLS = st.text(st.characters(categories=("L", "N")), max_size=12)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6).flatmap(lambda n: st.lists(st.tuples(*[CELLS] * n), min_size=1)))
def test_a_text_table_keeps_every_cell_and_its_width(rows):
    header = [f"c{column}" for column in range(len(rows[0]))]
    lines = [*text_table(header, rows, width=30, words=(True,))]
    widest = max(cell_len(cell) for row in (header, *rows) for cell in row)
    assert all(cell_len(line) <= max(30, 2 * widest + 2) for line in lines)
    text = "\n".join(lines)
    assert all(cell in text for row in (header, *rows) for cell in row)
