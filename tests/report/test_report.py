"""A run's page: every number of it is on disk, it asks for nothing, hostile names are text, and a
run that is still going or that went wrong has a page as well."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from federation import as_sets, small
from flexlora.commands.cli import main
from flexlora.config.resolve import all_keys
from flexlora.errors import UserError
from flexlora.report import write_report
from flexlora.report.records import RunRecords
from flexlora.runs.folder import RunFolder
from flexlora.simulations import simulate as simulate_module
from flexlora.simulations.simulate import simulate
from pages import (
    asked_for,
    client_row,
    numbers_in,
    numbers_on_disk,
    read_page,
    rounded,
    rows_of,
    written_run,
)

TRIED = {"eval__generate": "ends", "eval__max_new_tokens": 4, "eval__max_examples": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two rounds, really run: its folder with its page."""
    folder = tmp_path_factory.mktemp("report") / "run"
    simulate(small(num_server_rounds=2, **TRIED), folder)
    write_report(folder)
    return folder


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def report_of(folder):
    return read_page(write_report(folder))


def strangers(page, folder):
    """What the page shows as a number of a file and no file holds, or shows wrongly rounded."""
    known = numbers_on_disk(folder)
    exact = [(value, shown) for value, shown, kind in page.data if kind != "derived"]
    assert len(exact) > 20, "a page without numbers passes for nothing"
    return {v for v, shown in exact if v not in known or not rounded(shown, v)}


def test_every_number_of_the_page_is_in_a_file(run):
    assert strangers(read_page(run / "report.html"), run) == set()


def test_a_number_of_another_run_would_be_seen(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    changed = metrics_of(run)[2]["eval_loss"]
    text = (run / "metrics.jsonl").read_text().replace(repr(changed), "7.125")
    (other / "metrics.jsonl").write_text(text)
    assert strangers(read_page(run / "report.html"), other) == {changed}


def test_sums_and_counts_are_those_of_the_files(run):
    """What the page adds up itself, added up here from the rows."""
    rounds, rows = metrics_of(run), rows_of(run / "clients.csv")
    sums = {sum(row.get(key, 0) for row in rounds) for key in ("bytes_down", "bytes_up")}
    sums |= {sum(row["seconds"] for row in rounds), sum(row["status"] == "ok" for row in rows), 0}
    index = json.loads((run / "checkpoint" / "current.json").read_text())
    dealt = [given["name"] for given in index["rank_classes"].values()]
    for name in set(dealt):
        members = [row for row in rows if row["rank_class"] == name]
        examples = {row["client_id"]: int(row["num_examples"]) for row in members}
        sums |= {dealt.count(name), len(examples), sum(examples.values())}
        for key in ("bytes_down", "bytes_up"):
            sums.add(sum(int(row[key]) for row in members) / len(members))
    examples = {row["client_id"]: int(row["num_examples"]) for row in rows}
    sums |= {len(dealt), sum(examples.values()), len(rows)}  # of the only device
    sums |= to_the_targets(rounds)
    derived = [(value, shown) for value, shown, kind in read_page(run / "report.html").data if kind]
    assert {value for value, _ in derived} == sums
    assert all(rounded(shown, value) for value, shown in derived)


def to_the_targets(rounds):
    """The target losses, and what was spent up to the first round at each."""
    base, *trained = (row["eval_loss"] for row in rounds)
    targets = {base + share * (min(trained) - base) for share in (0.5, 0.8, 0.9, 0.95)}
    targets.add(min(trained))
    found = set(targets)
    for target in targets:
        at = next(k for k, loss in enumerate(trained, start=1) if loss <= target)
        spent = rounds[: at + 1]
        found.add(sum(row.get(key, 0) for row in spent for key in ("bytes_down", "bytes_up")))
        found.add(sum(row["seconds"] for row in spent))
    return found


def test_the_points_of_the_charts_say_what_the_rounds_say(run):
    rounds = metrics_of(run)
    said = read_page(run / "report.html").said("title")
    printed = [
        found.groups() for text in said if (found := re.fullmatch(r"(.+), round (\d): (.+)", text))
    ]
    assert len(printed) > 20
    for name, at, shown in printed:
        numbers = numbers_in(rounds[int(at)])
        assert any(rounded(shown, value) for value in numbers), (name, at, shown)
    training = {int(at): shown for name, at, shown in printed if name == "training loss"}
    assert training == {at: f"{rounds[at]['train_loss']:.3f}" for at in (1, 2)}


def test_no_other_number_stands_between_the_words(run):
    """Names, settings, versions: every digit of them is in a file, or in the help of an option."""
    kept = [run / "metrics.jsonl", *run.glob("*.csv"), *run.glob("*.toml"), *run.glob("*.json")]
    held = "".join(file.read_text() for file in kept)
    held += "".join(f"{info.default} {info.description}" for info in all_keys().values())
    page = read_page(run / "report.html")
    free = [text for path, text in page.texts if not {"svg", "style"} & {*path}]
    words = {word.rstrip(".") for text in free for word in re.findall(r"\d[\d.]*", text)}
    assert words and {word for word in words if word not in held} == set()


def test_the_page_asks_for_nothing_and_runs_nothing(run):
    text = (run / "report.html").read_text()
    page = read_page(run / "report.html")
    assert asked_for(page) == [] and not re.search("https?:", text)
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert len(set(page.ids())) == len(page.ids())


@pytest.mark.parametrize(
    "breach",
    [
        "<script>1</script>",
        '<img src="x.png">',
        '<a href="http://x">y</a>',
        '<p onclick="x()">y</p>',
        '<p style="background:url(x)">y</p>',
        "<style>@import 'x'</style>",
    ],
)
def test_each_way_of_asking_would_be_seen(breach, tmp_path):
    (tmp_path / "page.html").write_text(f"<main>{breach}</main>")
    assert asked_for(read_page(tmp_path / "page.html")) != []


def test_every_picture_has_a_title_and_a_description(run):
    page = read_page(run / "report.html")
    pictures = [a for tag, a in page.elements if tag == "svg" and "aria-hidden" not in a]
    assert len(pictures) >= 8
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert set(attributes["aria-labelledby"].split()) <= set(page.ids())
    first, last = (metrics_of(run)[at]["eval_loss/rank_2"] for at in (0, 2))
    spoken = [text for text in page.said("desc") if f"{first:.3f} at round 0" in text]
    assert any(f"{last:.3f} at round 2" in text for text in spoken)


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "elsewhere" / "run")
    before = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == before
    assert write_report(copy).read_bytes() == before


def test_base_and_last_round_stand_beside_each_other_per_rank_class(tmp_path):
    folder = written_run(tmp_path / "run", (3.0, 2.0, 1.5))
    table = report_of(folder).table("Held-out rows")
    assert table[0] == ["rank class", "loss: base", "after round 2", "energy kept"]
    assert table[1:] == [
        ["all clients, each at its own rank", "3.000", "1.500", ""],
        ["rank_2", "3.000", "1.500", "90.0 %"],
        ["rank_4", "2.700", "1.350", "95.0 %"],
    ]


def test_a_score_of_the_base_alone_is_not_shown_as_the_last(tmp_path):
    """Answers are generated at both ends only: a run in progress has the base's."""
    extra = {0: {"eval_exact_match": 0.25}}
    folder = written_run(tmp_path / "run", (3.0, 2.0), extra=extra, num_server_rounds=5)
    table = report_of(folder).table("Held-out rows")
    assert table[0][1:] == ["loss: base", "after round 1", "exact match: base", "energy kept"]
    assert table[1][1:] == ["3.000", "2.000", "0.250", ""]


def test_a_run_in_progress_has_a_page_of_its_whole_rounds(tmp_path):
    """A line cut short by a crash, and rows of a round that was never closed, are left out."""
    folder = written_run(tmp_path / "run", (3.0, 2.0), num_server_rounds=9)
    RunFolder(folder)._append_csv("clients.csv", [client_row("x", round=2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "eval_lo')
    page = report_of(folder)
    assert "Not finished: round 1 of 9 is the last that is done." in page.said()
    assert [row[0] for row in page.table("All numbers by round")[1:]] == ["0", "1"]
    assert page.table("Rank classes")[1][4] == "1" and "x" not in page.said("bdi")
    folder = written_run(tmp_path / "done", (3.0, 2.0))
    assert not any("Not finished" in text for text in report_of(folder).said())


def test_a_run_before_its_first_round_has_a_page(tmp_path):
    folder = written_run(tmp_path / "run", ())
    page = report_of(folder)
    assert "No round is done yet, not even the evaluation of the base." in page.said()
    assert asked_for(page) == [] and "FlexLoRA run run" in page.said("title")


def test_failures_are_grouped_by_their_cause(tmp_path):
    folder = written_run(tmp_path / "run", (3.0, 2.0, 1.0))
    rows = [
        client_row(f"c{k}", round=k % 2 + 1, status="failed", cause="no reply") for k in range(8)
    ]
    rows += [client_row("d", round=2, status="refused", cause="lora_A holds NaN")]
    rows += [client_row("e", round=1, cause="late: trained from round 0")]
    rows += [{"round": 0, "client_id": "f", "status": "left out", "cause": "no rows"}]
    RunFolder(folder)._append_csv("clients.csv", rows)
    table = report_of(folder).table("Failures and notes")
    assert table[1:] == [
        ["failed", "no reply", "c0, c1, c2, c3, c4, c5, ...", "1, 2", "8"],
        ["refused", "lora_A holds NaN", "d", "2", "1"],
        ["left out", "no rows", "f", "0", "1"],
        ["ok, with a note", "late: trained from round 0", "e", "1", "1"],
    ]
    clean = report_of(written_run(tmp_path / "clean", (3.0, 2.0)))
    assert any(text.startswith("None: every client") for text in clean.said())


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src="http://evil.example/x.png" onerror="x()">',
    "</table></main><style>@import 'http://evil.example'</style>",
    "a&lt;b&#60;c",
    'line\nbreak,\u2028and "quotes"',
)


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_names_are_text(words, tmp_path):
    """A client's name, its cause, its device, its rank class and a setting, all of them hostile."""
    folder = written_run(tmp_path / "run", (3.0, 2.0), data__path=words)
    row = client_row(words, status="failed", cause=words, device=words)
    row |= {"rank_class": words, "quantization": words}
    RunFolder(folder)._append_csv("clients.csv", [row])
    extra = {
        "round": 2,
        "eval_loss": 1.0,
        f"eval_loss/{words}": 1.0,
        "modules": {words: {"rank": 2}},
    }
    RunFolder(folder).append_round(extra, [], [])
    page = report_of(folder)
    assert asked_for(page) == []
    assert sum(words in text for text in page.said()) >= 6


def test_what_no_page_can_hold_is_replaced(tmp_path):
    folder = written_run(tmp_path / "run", (3.0, 2.0), data__path="a\x07b\u202ec")
    assert "a\ufffdb\ufffdc" in report_of(folder).said("bdi")


def test_personal_and_simulated_numbers_are_shown_where_they_are(tmp_path):
    plain = written_run(tmp_path / "plain", (3.0, 2.0))
    assert not {"Personal against global", "Simulated seconds"} & {*report_of(plain).said()}
    at = {"eval_loss/personal": 0.8765, "simulated_seconds": 3600.0, "joules": 1234.0}
    folder = written_run(tmp_path / "rich", (3.0, 2.0, 1.0), extra={1: at, 2: at})
    page = report_of(folder)
    for title in ("Personal against global", "Simulated seconds", "Joules"):
        assert title in page.said()
    assert ["clients with factors of their own, with them", "", "0.876", ""] in page.table(
        "Held-out rows"
    )
    shown = {shown: value for value, shown, kind in page.data if kind == "derived"}
    assert shown["2.0 h"] == 7200.0 and shown["2.5 kJ"] == 2468.0
    assert "personal" not in [row[0] for row in page.table("Rank classes")]


def test_only_settings_that_are_not_the_default_are_listed(tmp_path):
    changes = {"lora__rslora": True, "num_server_rounds": 1, "method__carried_rank": 5}
    folder = written_run(tmp_path / "run", (3.0, 2.0), **changes)
    with (folder / "config.toml").open("a") as file:
        file.write('\n[later]\nkey = "x"\n')
    rows = report_of(folder).table("Configuration that is not the default")[1:]
    assert sorted(row[:3] for row in rows) == [
        ["engine.threads", "1", "0"],
        ["later.key", "x", "(no such key in this version)"],
        ["lora.rslora", "true", "false"],
        ["method.carried-rank", "5", "(the method's)"],
        ["num-server-rounds", "1", "8"],
    ]


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match=r"is not a run folder: no config.toml"):
        write_report(tmp_path)
    folder = written_run(tmp_path / "series" / "seed-3", (3.0, 2.0))
    (tmp_path / "series" / "seeds.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"is a series of seeds, expected one run, such as .*seed-3"
    ):
        write_report(tmp_path / "series")
    (folder / "environment.json").write_text("{half")
    with pytest.raises(UserError, match=r"environment.json' is damaged"):
        write_report(folder)
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "nothing' is not a run folder" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = written_run(tmp_path / "run", (3.0, 2.0))
    (folder / "report.html").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"report.html' cannot be written: No space left"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "old"


def test_simulate_leaves_a_page_and_report_writes_the_same(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["simulate", *as_sets(small()), "--out", str(out)]) == 0
    assert f"Report: {out / 'report.html'}" in capsys.readouterr().out
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_bytes() == page


def test_a_report_that_fails_does_not_fail_the_run(tmp_path, capsys, monkeypatch):
    def broken(path):
        raise ZeroDivisionError("no axis")

    monkeypatch.setattr(simulate_module, "write_report", broken)
    assert main(["simulate", *as_sets(small()), "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert (
        "the run is whole, but its report was not written (ZeroDivisionError: no axis)"
        in printed.err
    )
    assert "Run folder:" in printed.out and not (tmp_path / "run" / "report.html").exists()


def test_a_report_needs_neither_torch_nor_flower():
    code = (
        "import sys, flexlora.report\n"
        "heavy = {'torch', 'flwr', 'transformers', 'numpy', 'ray'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_client_is_shown_in_the_class_that_its_rows_were_scored_in(tmp_path):
    """c0 trains at rank 8 in round 1 and is granted rank 4 for it, and rank 2 after round 3."""

    def trained(server_round, client, name):
        return {"round": str(server_round), "client_id": client, "rank_class": name}

    losses = {"rank_2": "3.0", "rank_4": "2.0", "rank_8": "1.0"}
    run = RunRecords(
        path=tmp_path,
        config={},
        environment={},
        rounds=tuple({"round": at} for at in range(4)),
        clients=(
            trained(1, "c0", "rank_8"),
            trained(1, "c1", "rank_8"),
            trained(2, "c0", "rank_4"),
            trained(3, "c0", "rank_4"),
        ),
        evaluations=tuple(
            {**trained(at, client, name), "eval_loss": loss}
            for at in (1, 2, 3)
            for client in ("c0", "c1")
            for name, loss in losses.items()
        ),
        classes={"c0": {"name": "rank_2"}, "c1": {"name": "rank_8"}},
    )
    seen = [run.client_loss(at) for at in (1, 2, 3)]
    assert [own["c0"] for own in seen] == [2.0, 2.0, 3.0]
    assert [own["c1"] for own in seen] == [1.0, 1.0, 1.0]
    assert replace(run, classes={}).client_loss(3) == {"c0": 2.0, "c1": 1.0}
