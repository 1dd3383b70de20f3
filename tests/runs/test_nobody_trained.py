"""A run in which nobody was trained says so by its exit status and in one sentence."""

from __future__ import annotations

import pytest

from federation import StopAt, Stopped, as_sets, rounds, small
from flexlora.commands.cli import main
from flexlora.config.resolve import Config
from flexlora.errors import RunFailed
from flexlora.runs.folder import RunFolder
from flexlora.runs.live_state import FAILED, FINISHED, read_live
from flexlora.runs.verdict import nobody_trained
from flexlora.simulations.simulate import resume, simulate

DIVERGING = small(num_server_rounds=2, train__learning_rate=1e30)


def test_the_command_ends_with_status_1_and_the_folder_is_whole(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["simulate", *as_sets(DIVERGING), "--out", str(folder)]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("flexlora: no client was trained in 2 rounds (8 of 8 trainings failed)")
    assert "the training loss is not finite; lower the learning rate" in line
    assert "Report: " in captured.out and (folder / "report.html").is_file()
    assert [row["round"] for row in rounds(folder)] == [0, 1, 2]
    assert not (folder / "adapters").exists(), "there is nothing to deploy"
    assert read_live(folder).state == FAILED
    assert main(["report", str(folder)]) == 0
    assert main(["simulate", "--resume", str(folder)]) == 1, "a second look says the same"


def test_a_program_gets_an_exception_and_one_training_is_enough(tmp_path):
    with pytest.raises(RunFailed, match="no client was trained in 1 round "):
        simulate(DIVERGING.with_values({"num-server-rounds": 1}), tmp_path / "none")
    simulate(small(), tmp_path / "some")
    assert nobody_trained(RunFolder(tmp_path / "some")) == ""
    assert read_live(tmp_path / "some").state == FINISHED


def test_a_run_that_broke_off_is_not_judged(tmp_path):
    with pytest.raises(Stopped):
        simulate(DIVERGING, tmp_path / "run", observer=StopAt("round_started", 2))
    with pytest.raises(RunFailed):
        resume(tmp_path / "run")


def run_of(tmp_path, rows, *metrics):
    run = RunFolder.create(tmp_path / "run", Config())
    for at, values in enumerate(metrics):
        cells = [{"round": at, "client_id": c, "status": s, "cause": w} for c, s, w in rows if at]
        run.append_round({"round": at, **values}, cells, [])
    return run


FAILED_ROWS = [
    ("a", "failed", "client a: 3 of 5 rows hold NaN"),
    ("b", "failed", "client b: 4 of 9 rows hold NaN"),
    ("c", "refused", "client c: lora_A has shape (1, 2)"),
    ("d", "backing off", "sits out to round 9"),
    ("e", "left out", "no train rows"),
]


def test_the_most_frequent_cause_is_told_whatever_its_numbers(tmp_path):
    run = run_of(tmp_path, FAILED_ROWS, {}, {"clients_ok": 0, "clients_failed": 3})
    sentence = nobody_trained(run)
    assert "in 1 round (3 of 3 trainings failed)" in sentence
    assert "2 times client a: 3 of 5 rows hold NaN" in sentence and "\n" not in sentence


def test_rounds_that_were_all_skipped_are_told_too(tmp_path):
    skipped = {"clients_ok": 1, "skipped": "skipped: 1 updates came, server.quorum is 2"}
    run = run_of(tmp_path, [("a", "ok", "")], {}, skipped, skipped)
    assert "in 2 rounds" in nobody_trained(run) and "server.quorum is 2" in nobody_trained(run)


def test_a_run_that_changed_its_model_once_has_trained(tmp_path):
    run = run_of(tmp_path, FAILED_ROWS, {}, {"clients_ok": 0}, {"clients_ok": 1}, {"clients_ok": 0})
    assert nobody_trained(run) == ""
    assert nobody_trained(run_of(tmp_path / "base", [], {})) == "", "round 0 trains nobody"
