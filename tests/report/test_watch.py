"""``flexlora watch``: what it shows of folders in every state, and of runs that really go on."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from federation import as_sets, command, finished, small
from flexlora.commands.cli import main
from flexlora.errors import UserError
from flexlora.report.snapshots import GRACE_SECONDS, SILENT_SECONDS, SnapshotReader, find_run
from flexlora.report.watch import watch
from flexlora.runs.folder import RunFolder
from flexlora.runs.live_state import LIVE_FILE, read_live, write_live
from pages import client_row, written_run
from watching import alive, run_in_progress, shown


@pytest.fixture
def going(tmp_path, monkeypatch):
    """A run in progress, and a clock that stands: ages are what they are on a busy machine too."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    return run_in_progress(tmp_path / "run")


def test_where_only_ascii_prints_only_ascii_is_printed(going):
    write_live(going, alive(replied=("Zoë",)))
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    console = Console(file=file, width=80, height=40, markup=False, highlight=False)
    assert watch(str(going), once=True, console=console) == 0
    file.flush()
    text = file.buffer.getvalue().decode("ascii")
    assert "rank_2" in text and "#-_" in text and "Zo?" in text


def test_half_written_lines_are_left_out_until_they_are_whole(going):
    look = SnapshotReader(going)
    assert look().records.last_round == 2
    line = json.dumps({"round": 3, "eval_loss": 1.25, "eval_loss/rank_2": 1.25, "seconds": 1.0})
    with (going / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(line[:20])
        file.flush()
        assert look().records.last_round == 2
        file.write(line[20:] + "\n")
    assert look().records.last_round == 3
    with (going / "clients.csv").open("a", encoding="utf-8") as file:
        file.write('3,client_02,rank_2,2,none,"half of a')
    assert "rank_2" in shown(SnapshotReader(going)())


def test_rows_that_a_resume_takes_back_are_gone(going):
    look = SnapshotReader(going)
    assert look().records.last_round == 2
    RunFolder(going).rewind(1)
    assert look().records.last_round == 1
    assert "round 2 client_09" not in " ".join(shown(look()).split())


def test_a_process_that_has_gone_is_told(going):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_live(going, alive(pid=gone.pid, updated=time.time() - 95))
    sight = SnapshotReader(going)()
    assert sight.over and not sight.finished
    text = " ".join(shown(sight, 120).split())
    assert f"No sign of life for 95 s: its process {gone.pid} has gone." in text
    assert "after round 2 of 8" in text and "about" not in text


def test_a_process_id_given_again_is_not_the_run(going):
    """This test's own process is younger than a run that says it began a day ago."""
    write_live(going, alive(started=time.time() - 86400))
    assert "has gone" in SnapshotReader(going)().trouble


def test_on_another_machine_only_silence_can_be_seen(going):
    write_live(going, alive(pid=2**22 + 5, host="elsewhere"))
    assert SnapshotReader(going)().trouble == ""
    write_live(going, alive(host="elsewhere", updated=time.time() - 95))
    sight = SnapshotReader(going)()
    assert sight.trouble == "no sign of life for 95 s" and not sight.over
    assert SILENT_SECONDS < 95


def test_another_machines_clock_may_be_wrong(going):
    """After the second word it is our own clock that counts, an hour behind or ahead."""
    for hours in (-1, 1):
        look = SnapshotReader(going)
        write_live(going, alive(host="elsewhere", updated=time.time() + 3600 * hours))
        assert bool(look().trouble) == (hours < 0)
        write_live(going, alive(host="elsewhere", updated=time.time() + 3600 * hours + 1))
        assert look().trouble == ""


def test_a_silent_run_that_speaks_again_is_no_trouble(going, monkeypatch):
    now = time.monotonic()
    look = SnapshotReader(going)
    assert look().trouble == ""
    monkeypatch.setattr(time, "monotonic", lambda: now + SILENT_SECONDS + 10)
    assert re.fullmatch(r"no sign of life for 4\d s", look().trouble)
    write_live(going, alive(updated=time.time() + 40))
    assert look().trouble == ""


def test_a_folder_of_an_older_version_is_finished_by_its_rows(tmp_path, monkeypatch):
    done = SnapshotReader(written_run(tmp_path / "done"))()
    assert done.over and done.finished and done.trouble == ""
    look = SnapshotReader(written_run(tmp_path / "part", num_server_rounds=9))
    assert not look().over and "no live.json" in look().trouble
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + GRACE_SECONDS + 1)
    assert look().over and not look().finished


def test_once_prints_one_frame_without_escape_codes(going, capsys):
    assert main(["watch", str(going), "--once"]) == 0
    out, err = capsys.readouterr()
    assert "round 3 of 8, training" in out and "\x1b" not in out and err == ""


def test_the_newest_run_is_watched_where_none_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["watch"]) == 2
    assert "there is no run under 'runs'; name a run folder." in capsys.readouterr().err
    for age, name in ((50, "runs/a"), (10, "runs/series/seed-1"), (90, "runs/b")):
        path = written_run(tmp_path / name)
        for file in path.iterdir():
            os.utime(file, (time.time() - age, time.time() - age))
    assert str(find_run(None)) == "runs/series/seed-1"
    assert main(["watch", "--once"]) == 0
    assert capsys.readouterr().out.startswith("runs/series/seed-1\n")
    write_live(tmp_path / "runs" / "b", alive())
    assert str(find_run(None)) == "runs/b"
    (tmp_path / "runs" / "series" / "seeds.json").write_text("{}")
    assert str(find_run("runs/series")) == "runs/series/seed-1"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("runs/frist", r"'runs/frist' does not exist\. Did you mean 'runs/first'\?$"),
        ("runs", r"'runs' is not a run folder: no config.toml"),
    ],
)
def test_a_wrong_path_is_one_sentence(target, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written_run(tmp_path / "runs" / "first")
    with pytest.raises(UserError, match=words):
        find_run(target)
        SnapshotReader(find_run(target))
    assert main(["watch", target, "--once"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("flexlora: ")


def test_a_folder_that_goes_away_is_one_sentence(going):
    look = SnapshotReader(going)
    look()
    for file in (*going.iterdir(),):
        file.unlink()
    assert look().records.last_round == 2, "it is being made anew: what was seen last stands"
    going.rmdir()
    with pytest.raises(UserError, match="has gone"):
        look()


def append_round(path, at, **more):
    """Round ``at`` as a run would append it."""
    metrics = {"round": at, "eval_loss": 1.0 / at, "eval_loss/rank_2": 1.0 / at, "seconds": 1.25}
    RunFolder(path).append_round(metrics | more, [client_row("client_0", round=at)], [])


@pytest.fixture
def meanwhile(monkeypatch):
    """``meanwhile(steps)``: one of them is done each time that the watcher has looked and waits."""

    def give(steps):
        left = iter(steps)
        clock = SimpleNamespace(sleep=lambda seconds: next(left)())
        monkeypatch.setattr("flexlora.report.watch.time", clock)

    return give


def test_where_there_is_no_terminal_each_round_is_a_line(going, meanwhile, capsys):
    steps = [
        lambda: append_round(going, 3, clients_ok=7, clients_failed=1, train_loss=0.5),
        lambda: write_live(going, alive(host="elsewhere", updated=time.time() - 95)),
        lambda: write_live(going, alive(host="elsewhere", updated=time.time())),
        lambda: append_round(going, 4, skipped="skipped: 1 updates came, server.quorum is 2"),
        lambda: write_live(going, alive(state="finished", round=4)),
    ]
    meanwhile(steps)
    console = Console(width=80, markup=False, highlight=False)
    assert watch(str(going), once=False, console=console) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and "\x1b" not in out
    assert lines[0] == f"{going}: carried on embedded, 18 clients: rank_2 12, rank_4 6"
    assert [line.split("  ")[0] for line in lines[1:-1]] == [
        "round 0/8",
        "round 1/8",
        "round 2/8",
        "round 3/8",
        "round 4/8",
    ]
    assert "7 clients, 1 failed  train 0.500  eval 0.333" in lines[4] and "1.2 s" in lines[4]
    assert "server.quorum is 2" in lines[5]
    assert lines[-1] == "finished, round 4 of 8."


def test_silence_is_told_once_and_a_rewound_round_again(going, meanwhile, capsys):
    steps = [
        lambda: write_live(going, alive(host="elsewhere", updated=time.time() - 500)),
        lambda: None,
        lambda: RunFolder(going).rewind(1),
        lambda: append_round(going, 2, train_loss=0.7),
        lambda: write_live(going, alive(state="failed", cause="the disk is full.")),
    ]
    write_live(going, alive(host="elsewhere", updated=time.time() - 400))
    meanwhile(steps)
    console = Console(width=80, markup=False, highlight=False)
    assert watch(str(going), once=False, console=console) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("no sign of life" in line for line in lines) == 1
    assert [line.split()[1] for line in lines if line.startswith("round")] == [
        "0/8",
        "1/8",
        "2/8",
        "2/8",
    ]
    assert lines[-1] == "failed after round 2 of 8: the disk is full."


def test_on_a_terminal_the_picture_follows_and_the_last_one_stays(going, meanwhile):
    text = io.StringIO()
    options = {"markup": False, "highlight": False, "color_system": None}
    console = Console(file=text, force_terminal=True, width=100, height=40, **options)
    steps = [
        lambda: append_round(going, 3),
        lambda: write_live(going, alive(state="finished", round=3)),
    ]
    meanwhile(steps)
    assert watch(str(going), once=False, console=console) == 0
    drawn = text.getvalue()
    assert drawn.index("round 3 of 8, training") < drawn.index("finished, round 3 of 8")
    assert "0.333" in drawn.split("finished, round 3 of 8")[1]


def test_interrupting_the_watcher_is_quiet_and_leaves_the_run(going):
    """A process of its own, with a run that never ends."""
    before = (going / LIVE_FILE).read_bytes()
    process = command("watch", going)
    assert process.stdout.readline().startswith(str(going))
    process.send_signal(signal.SIGINT)
    status, _, errors = finished(process)
    assert status == 130
    assert errors == "flexlora: no longer watching; the run is left alone.\n"
    assert (going / LIVE_FILE).read_bytes() == before


def test_a_watcher_loads_neither_torch_nor_flower():
    code = (
        "import sys, flexlora.report.watch\n"
        "print([name for name in ('torch', 'flwr', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.slow
def test_a_real_run_is_followed_from_another_process_to_its_end(tmp_path):
    config = small(num_server_rounds=3)
    run = command("simulate", *as_sets(config), "--out", tmp_path / "run")
    until = time.monotonic() + 600
    while read_live(tmp_path / "run") is None:
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    watching = command("watch", tmp_path / "run")
    status, out, errors = finished(watching)
    assert (status, errors) == (0, "")
    assert finished(run)[0] == 0
    lines = out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("round")] == [
        "0/3",
        "1/3",
        "2/3",
        "3/3",
    ]
    assert lines[-1] == "finished, round 3 of 3."


@pytest.mark.slow
def test_a_run_that_is_killed_is_told_to_have_gone(tmp_path):
    config = small(num_server_rounds=500)
    run = command("simulate", *as_sets(config), "--out", tmp_path / "run")
    watching = None
    try:
        until = time.monotonic() + 600
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        watching = command("watch", tmp_path / "run")
        assert watching.stdout.readline()
        run.kill()
        run.communicate()
        status, out, errors = finished(watching)
        assert (status, errors) == (1, "")
        assert re.search(rf"No sign of life for \d+ s: its process {run.pid} has gone\.", out)
    finally:
        for process in (run, watching):
            if process is not None and process.poll() is None:
                process.kill()
                process.communicate()
