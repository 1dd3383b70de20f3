"""The private files of old runs: an age and a size, and never those of the run at work."""

from __future__ import annotations

import os
import re
import time

import pytest

from flexlora.clients.trainer import run_files
from flexlora.clients.trainer.run_files import RunFiles
from flexlora.commands.cli import main
from trainers import cause_of, resident, run_config, train_message, write_rows

HOUR = 3600.0


def fake_run(folder, run, *, hours, size):
    """A run's files, the newest so many hours old."""
    for name, age in (("site/round-000001", hours + 5), ("feedback/site/round-000002", hours)):
        path = folder / f"run-{run}" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size // 2))
        os.utime(path, (time.time() - age * HOUR,) * 2)


def files_of(folder, *, max_bytes=10**9, hours=1e6):
    return RunFiles(folder, max_bytes=max_bytes, max_seconds=hours * HOUR)


def runs(folder):
    return sorted(int(path.name.removeprefix("run-")) for path in folder.iterdir())


def test_two_hundred_runs_the_oldest_go_first(tmp_path):
    """Run k is 200 - k hours old and has 1,000 bytes."""
    for run in range(200):
        fake_run(tmp_path, run, hours=200 - run, size=1000)
    files = files_of(tmp_path, max_bytes=50_500, hours=120.5)
    assert files.usage() == (200, 200_000)
    at_work = files.of_run("3")
    removed = files.trim(at_work=[at_work])
    assert runs(tmp_path) == [3, *range(151, 200)]  # 50 runs fit
    assert len(removed) == 150 and files.usage() == (50, 50_000)
    assert files.trim(at_work=[at_work]) == []
    files.trim()
    assert runs(tmp_path) == list(range(151, 200))  # it was too old


def test_the_run_at_work_stays_whatever_it_takes(tmp_path):
    fake_run(tmp_path, 1, hours=900, size=10_000)
    fake_run(tmp_path, 2, hours=1, size=10)
    files = files_of(tmp_path, max_bytes=100, hours=24)
    files.trim(at_work=[files.of_run("1")])
    assert runs(tmp_path) == [1]


def test_a_run_goes_as_a_whole_over_a_crash(tmp_path, monkeypatch):
    """Its older rounds alone would be taken for where it stood."""
    fake_run(tmp_path, 1, hours=900, size=10)
    with monkeypatch.context() as crash:
        crash.setattr(run_files.shutil, "rmtree", lambda *_, **__: None)
        files_of(tmp_path, hours=24).trim()
    assert [path.name for path in tmp_path.iterdir()] == ["removed-run-1"]
    files_of(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    files = files_of(tmp_path / "none")
    assert files.usage() == (0, 0) and files.trim() == []


@pytest.mark.parametrize("kind", ["personal", "feedback"])
def test_a_trainer_removes_old_runs_and_says_what_there_is(kind, tmp_path, capsys):
    keys = {
        "personal": {"personal__rank": 2, "personal__max_steps": 1},
        "feedback": {"wire__dtype": "int8", "method__name": "residual"},
    }[kind]
    config = run_config(train__max_steps=2, **keys)
    kept = tmp_path / "kept" / "personal"
    fake_run(kept, 1, hours=100, size=5000)
    fake_run(kept, 2, hours=1, size=5000)
    allowed = {"files.max-bytes": "6KB", "files.days": 2.0, "request.hours": "00:00-24:00"}
    data = write_rows(tmp_path / "data")
    with resident(data, tmp_path / "kept", allowed=allowed) as made:
        assert runs(kept) == [1, 2]  # which run is at work is not known yet
        message = train_message(config, method=config.method.name)
        assert cause_of(made.ask(message, config)) == ""
        assert runs(kept) == [7]  # 1 by its age, 2 by the size of run 7
        assert main(["client", "health", "--socket", str(made.path)]) == 0
        size = made.trainer.run_files.usage()[1]
        assert size > 6000
    printed = capsys.readouterr().out
    assert f"private  files of 1 runs, {size / 1000:.1f} kB" in printed, printed
    day = r"day      seconds \d of 86,400, requests 1 of 20,000, rows \d+ of 50,000,000"
    assert re.search(day, printed) and "week     seconds" in printed
    assert "request  hours 00:00-24:00, seconds 21,600, rank 1024, carried-rank" in printed
    assert "files    max-bytes 6KB, days 2" in printed and "train    max-steps 100000" in printed
