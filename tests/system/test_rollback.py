"""``flexlora rollback``: a run goes back to a kept round, and on to the same bytes."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from federation import (
    StopAt,
    Stopped,
    adapter_bytes,
    client_rows,
    rounds,
    same_bytes,
    small,
    untimed,
)
from flexlora.commands.cli import main
from flexlora.runs.audit_check import check_log
from flexlora.runs.checkpoints import kept_rounds, load_checkpoint
from flexlora.runs.folder import RunFolder
from flexlora.runs.lock import exclusive_lock
from flexlora.server.results import roll_back
from flexlora.simulations.simulate import resume, simulate

# What a client keeps between its rounds (personal factors, rounding errors) goes back too.
CONFIG = small(
    num_server_rounds=4,
    clients__count=2,
    lora__dropout=0.1,
    method__name="residual",
    wire__dtype="int8",
    personal__rank=2,
    personal__max_steps=1,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    simulate(CONFIG, folder)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def shorter(tmp_path_factory):
    """The run that never went further than its second round."""
    folder = tmp_path_factory.mktemp("shorter") / "run"
    with pytest.raises(Stopped):
        simulate(CONFIG, folder, observer=StopAt("round_started", 3))
    return folder


def assert_same_run(folder, other):
    assert adapter_bytes(folder) == adapter_bytes(other)
    assert untimed(rounds(folder)) == untimed(rounds(other))
    assert untimed(client_rows(folder)) == untimed(client_rows(other))
    assert (folder / "evaluation.csv").read_bytes() == (other / "evaluation.csv").read_bytes()
    (state, classes), (other_state, other_classes) = (
        load_checkpoint(path / "checkpoint") for path in (folder, other)
    )
    assert same_bytes(state, other_state) and classes == other_classes


def test_a_run_goes_back_to_a_kept_round_and_on_to_the_same_bytes(run, whole, shorter, capsys):
    assert kept_rounds(run / "checkpoint") == [2, 3, 4]
    assert adapter_bytes(run) != adapter_bytes(shorter)
    assert main(["rollback", str(run), "2"]) == 0
    said = capsys.readouterr().out
    assert "after round 2" in said and f"flexlora simulate --resume {run}" in said
    assert_same_run(run, shorter)
    assert kept_rounds(run / "checkpoint") == [2]
    personal = [path.name for path in (run / "personal").rglob("round-*")]
    assert personal and max(personal) == "round-000002.safetensors"
    resume(run)
    assert_same_run(run, whole)
    found = check_log(RunFolder(run))
    assert found.problems == [] and any("rolled back" in line for line in found.lines)


class Crash(BaseException):
    """Power goes: nothing cleans up after it."""


def crashing_at(step, patch):
    """The ``step``-th sync, rename, removal or append ends everything."""
    calls = []

    def crashing(honest):
        def call(*arguments, **options):
            calls.append(honest)
            if len(calls) > step:
                raise Crash
            return honest(*arguments, **options)

        return call

    for name in ("fsync", "replace", "unlink"):
        patch.setattr(os, name, crashing(getattr(os, name)))


def test_a_crash_at_any_step_of_a_rollback_is_finished_by_the_same_command(
    whole, shorter, tmp_path
):
    """Before the rename the run is where it was; after it, at the round that was asked for."""
    last, stood = 0, set()
    for step in range(60):
        folder = shutil.copytree(whole, tmp_path / f"run-{step}")
        with pytest.MonkeyPatch.context() as patch:
            crashing_at(step, patch)
            try:
                roll_back(str(folder), 2)
                last = step
            except Crash:
                pass
        stands = load_checkpoint(folder / "checkpoint")[0].round
        stood.add(stands)
        assert stands in (2, 4)
        if stands == 4:
            assert untimed(rounds(folder)) == untimed(rounds(whole)), "nothing is lost before"
        roll_back(str(folder), 2)
        assert_same_run(folder, shorter)
        assert check_log(RunFolder(folder)).problems == []
        shutil.rmtree(folder)
        if last:
            break
    assert last > 10 and stood == {2, 4}


def test_a_resume_finishes_a_rollback_that_was_cut_off_too(run, whole):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "rewind", lambda *_: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            roll_back(str(run), 2)
    resume(run)
    assert_same_run(run, whole)
    assert check_log(RunFolder(run)).problems == []


def refused(capsys, *words):
    assert main(["rollback", *map(str, words)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_round_that_is_not_kept_is_refused_with_those_that_are(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for server_round in (0, 1, 5):
        said = refused(capsys, run, server_round)
        assert f"no checkpoint of round {server_round}, but of 2, 3, 4;" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_at_work_and_a_folder_that_is_none_are_refused(run, tmp_path, capsys):
    with exclusive_lock(run):
        assert "still writing" in refused(capsys, run, 2)
    assert "is not a run folder" in refused(capsys, tmp_path, 2)
    shutil.rmtree(run / "checkpoint")
    assert "no round of this run was finished" in refused(capsys, run, 2)
    assert "'two'" in refused(capsys, run, "two")


def test_a_damaged_checkpoint_of_that_round_is_refused_and_nothing_changes(run, capsys):
    file = run / "checkpoint" / "round-000002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "damaged" in refused(capsys, run, 2)
    assert load_checkpoint(run / "checkpoint")[0].round == 4


def test_how_many_are_kept_is_a_key_and_bounds_the_disk(tmp_path):
    for keep in (1, 2):
        config = small(num_server_rounds=3, clients__count=1, server__keep_checkpoints=keep)
        simulate(config, tmp_path / str(keep))
        folder = tmp_path / str(keep) / "checkpoint"
        assert kept_rounds(folder) == [2, 3][-keep:]
        assert len(list(folder.glob("*.safetensors"))) == keep


def test_late_updates_come_again_after_a_rollback(tmp_path):
    """A kept checkpoint keeps the rounds that it waits for replies from."""
    config = small(
        clients__count=8,
        num_server_rounds=5,
        method__name="residual",
        train__max_steps=1,
        lora__target_modules="q_proj",
        eval__every=0,
        engine__cohort_size=4,
        population__straggler_share=0.4,
        population__straggler_slowdown=3.5,
        server__round_timeout_seconds=90.0,
        server__late_rounds=2,
    )
    whole = tmp_path / "whole"
    simulate(config, whole)
    late = [row for row in client_rows(whole) if row["cause"].startswith("late")]
    run = shutil.copytree(whole, tmp_path / "run")
    waiting = json.loads((run / "checkpoint" / "round-000003.json").read_text())["notes"]
    assert [row for row in late if int(row["round"]) > 3] and waiting["under_way"]
    roll_back(str(run), 3)
    resume(run)
    assert_same_run(run, whole)
