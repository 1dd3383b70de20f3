"""What it took to a loss, and what differs between rank classes that are served one adapter."""

from __future__ import annotations

import pytest

from flexlora.errors import UserError
from flexlora.report import write_report
from flexlora.report.records import read_run
from flexlora.report.targets import shared_targets
from flexlora.runs.samples_file import Sample, Samples, TruncatedLoss, write_samples
from pages import Page, asked_for, read_page, written_run

ALIKE = {"eval_loss/rank_2": 2.0, "eval_loss/rank_4": 2.00000003}


def report_of(folder):
    return read_page(write_report(folder))


def sampled(folder, *, at=1, prompt="2 and 2?", answers=None):
    answers = answers or {"base": "5", "global": "4", "personal": ""}
    given = {"client_id": "client_0", "rank_class": "rank_2", "task": "sums"}
    sample = Sample(prompt=prompt, reference="4", answers=answers, **given)
    losses = {
        "rank_2": TruncatedLoss(served=2.0, truncated=2.75),
        "rank_4": TruncatedLoss(served=2.0, truncated=2.25),
    }
    found = Samples(round=at, split="validation", samples=(sample,), rows=17, losses=losses)
    write_samples(folder, found)
    return folder


def test_a_target_is_reached_in_the_first_round_at_or_below_it(tmp_path):
    folder = written_run(tmp_path / "run", (4.0, 3.0, 2.0, 2.5, 1.0))
    table = report_of(folder).table("To a target loss")
    assert table[0] == ["target", "loss", "round", "bytes, down and up", "time here"]
    assert table[1] == ["50 % of the way", "2.500", "2", "4.0 MB", "3.8 s"]
    assert table[2][:3] == ["80 % of the way", "1.600", "4"]
    assert table[-1][:3] == ["the best", "1.000", "4"]


def test_a_loss_that_never_falls_has_no_targets(tmp_path):
    page = report_of(written_run(tmp_path / "run", (2.0, 3.0)))
    assert "To a target loss" not in page.said("h2")


def test_runs_are_compared_at_the_lowest_loss_that_all_reach(tmp_path):
    runs = [
        read_run(written_run(tmp_path / "one", (4.0, 3.0, 2.0))),
        read_run(written_run(tmp_path / "two", (4.0, 2.5, 2.75))),
    ]
    target, table = shared_targets(runs, ["one", "two"])
    assert target == 2.5
    page = Page(f"<main><h2>x</h2>{table}</main>")
    assert [row[:3] for row in page.table("x")[1:]] == [
        ["one", "2", "4.0 MB"],
        ["two", "1", "2.0 MB"],
    ]


def test_one_adapter_for_all_classes_is_one_row_and_the_classes_show_what_differs(tmp_path):
    memory = {"memory_bytes/rank_2": 1000, "memory_bytes/rank_4": 3000}
    energy = {"truncated_energy/rank_2": 0.5, "truncated_energy/rank_4": 0.75}
    extra = {1: {**ALIKE, **memory, **energy}}
    page = report_of(sampled(written_run(tmp_path / "run", (3.0, 2.0), extra=extra)))
    rows = page.table("Held-out rows")[1:]
    assert [row[0] for row in rows] == ["all clients; every rank class is served the same adapter"]
    header, *classes = page.table("Rank classes")
    columns = [dict(zip(header, row, strict=True)) for row in classes]
    titles = ["memory of a training", "energy of T_r alone", "loss of T_r alone", "as served"]
    assert [[row[title] for title in titles] for row in columns] == [
        ["1.0 kB", "50.0 %", "2.750", "2.000"],
        ["3.0 kB", "75.0 %", "2.250", "2.000"],
    ]
    assert "Energy of T_r alone" in page.said("figcaption")


def test_classes_that_are_served_different_adapters_keep_their_rows(tmp_path):
    """As under ``flexlora``, where what a class is served is its ``T_r(G)``."""
    kept = {"energy_kept/rank_2": 0.5, "truncated_energy/rank_2": 0.5}
    kept |= {"energy_kept/rank_4": 0.75, "truncated_energy/rank_4": 0.75}
    page = report_of(written_run(tmp_path / "run", (3.0, 2.0), extra={1: kept}))
    assert [row[0] for row in page.table("Held-out rows")[2:]] == ["rank_2", "rank_4"]
    assert "Energy of T_r alone" not in page.said("figcaption")


def test_answers_stand_side_by_side_and_an_equal_one_is_marked_in_words(tmp_path):
    page = report_of(sampled(written_run(tmp_path / "run", (3.0, 2.0))))
    assert page.said("dt") and "Answers" in page.said("h2")
    titles = [t for t in page.said("dt") if t.startswith(("reference", "base", "global", "pers"))]
    assert titles == ["reference", "base", "global (rank_2), equal", "personal"]
    assert "nothing" in page.said("i")


def test_a_hostile_answer_is_text(tmp_path):
    words = "</dd><script>alert(1)</script><img src=x>\u202e"
    folder = written_run(tmp_path / "run", (3.0, 2.0))
    page = report_of(sampled(folder, prompt=words, answers={"base": words}))
    assert asked_for(page) == []
    assert sum("<script>alert(1)</script>" in text for text in page.said("bdi")) == 2


def test_answers_of_a_round_that_was_rolled_back_are_not_shown(tmp_path):
    page = report_of(sampled(written_run(tmp_path / "run", (3.0, 2.0)), at=5))
    assert "Answers" not in page.said("h2")


@pytest.mark.parametrize("text", ["{half", "[]", '{"round": 1}', '{"samples": 3, "losses": {}}'])
def test_a_damaged_file_of_samples_is_refused(text, tmp_path):
    folder = written_run(tmp_path / "run", (3.0, 2.0))
    (folder / "samples.json").write_text(text)
    with pytest.raises(UserError, match=r"samples.json' is damaged.*report --samples"):
        write_report(folder)


def test_failures_are_drawn_by_round_and_status(tmp_path):
    folder = written_run(tmp_path / "run", (3.0, 2.0, 1.0))
    with (folder / "clients.csv").open("a") as file:
        file.write("2,c,rank_2,2,none,cpu,10,,,,,,,,refused,NaN\n" * 3)
    said = report_of(folder).said("title")
    assert {"refused, round 1: 0", "refused, round 2: 3"} <= {*said}
