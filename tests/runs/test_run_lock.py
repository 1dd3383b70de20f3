"""A run folder has one writer; a second one is refused, and what it would have spoiled stays."""

from __future__ import annotations

import subprocess
import sys

import pytest

from federation import small
from flexlora.commands.cli import main
from flexlora.errors import UserError
from flexlora.runs.folder import RunFolder
from flexlora.runs.lock import check_idle, exclusive_lock

HOLDER = """
import sys
from pathlib import Path
from flexlora.runs.lock import exclusive_lock
with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", small())


@pytest.fixture
def held(run):
    """The run in the hands of another process."""
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_until_the_first_has_gone(run, held):
    with pytest.raises(UserError, match="is a run that a process is still writing; wait for it"):
        check_idle(run.path)
    held.kill()
    held.wait()
    check_idle(run.path)


def test_it_is_not_overwritten_either(run, held):
    before = (run.path / "config.toml").read_bytes()
    with pytest.raises(UserError, match="still writing"):
        RunFolder.create(run.path, small(seed=9), overwrite=True)
    assert (run.path / "config.toml").read_bytes() == before


def test_a_lock_ends_with_its_block(run):
    with exclusive_lock(run.path), pytest.raises(UserError, match="still writing"):
        check_idle(run.path)
    check_idle(run.path)


def test_a_folder_without_a_finished_round_is_free(run):
    """A run that was refused before its first round must not be in the way of the next."""
    RunFolder.check_free(run.path, overwrite=False)
    (run.path / "metrics.jsonl").write_text('{"round": 0, "seconds": 1.0}\n')
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder.check_free(run.path, overwrite=False)


@pytest.mark.parametrize("words", [["--resume"], ["--overwrite", "--out"]])
def test_the_command_refuses_a_run_that_is_still_written(words, run, held, capsys):
    (run.path / "metrics.jsonl").write_text('{"round": 0, "seconds": 1.0}\n')
    before = sorted((path.name, path.read_bytes()) for path in run.path.iterdir())
    assert main(["simulate", *words, str(run.path)]) == 2
    assert "is still writing; wait for it" in capsys.readouterr().err
    assert sorted((path.name, path.read_bytes()) for path in run.path.iterdir()) == before
