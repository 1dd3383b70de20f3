"""The picture of ``flexlora watch``: what it says of a run, at any width, whatever clients say."""

from __future__ import annotations

import re
import time

import pytest

from federation import small
from flexlora.report.snapshots import SnapshotReader
from flexlora.report.watch_view import sparkline
from flexlora.runs.folder import RunFolder
from flexlora.runs.live_state import Failure, write_live
from pages import written_run
from watching import alive, run_in_progress, shown


@pytest.fixture
def going(tmp_path, monkeypatch):
    """A run in progress, and a clock that stands: ages are what they are on a busy machine too."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    return run_in_progress(tmp_path / "run")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_frame_says_what_a_person_asks_for_at_any_width(going, width):
    text = shown(SnapshotReader(going)(), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    flat = " ".join(text.split())
    for words in (
        "carried on embedded, 18 clients: rank_2 12, rank_4 6",
        "round 3 of 8, training, 5.8 s in rounds",
        "5 of 8 clients replied, 1 failed",
        "client_03: Flower error 5",
        "left out so far: 1; the last round 2 client_09",
        "replied: client_07, client_05",
        "3.0 MB down, 1.0 MB up",
    ):
        assert words in flat, (words, text)
    assert re.search(r"rank_4 +.*1\.350", text), text
    if width >= 80:
        assert re.search(r"rank_2 +3\.500 +2\.000 +1\.500 +█▃▁", text), text
        assert re.search(r"about 6\.[0-3] s left", flat)  # six rounds of 1.25 s, less this one


def test_many_rounds_and_many_classes_fit(tmp_path):
    names = tuple(f"rank_{rank}" for rank in range(1, 31))
    path = written_run(
        tmp_path / "run", [3.0 / (1 + at) for at in range(51)], classes=names, num_server_rounds=50
    )
    sight = SnapshotReader(path)()
    text = shown(sight, 80, 30)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= 30
    header = next(line for line in lines if "all rounds" in line).split()
    assert "base" in header and "50" in header and "49" in header and "20" not in header
    assert f"and {30 - 14} more rank classes" in text
    assert "finished, after round 50 of 50" in text
    assert "more rank classes" not in shown(sight, 200, 100)


def test_the_course_falls_with_the_loss():
    assert sparkline([3.0, 2.0, 1.0], 20) == "█▅▁"
    assert sparkline([3.0, 2.0, 1.0], 20, ascii_only=True) == "#+_"
    assert sparkline([1.0] * 5, 20) == "▁▁▁▁▁" and sparkline([], 20) == ""
    long = sparkline([float(k) for k in range(1000, 0, -1)], 20)
    assert len(long) == 20 and list(long) == sorted(long, reverse=True)


def test_a_client_cannot_send_commands_to_the_terminal(going):
    evil = "\x1b]0;owned\x07\x1b[2J\r\n[red]x"
    write_live(going, alive(failures=(Failure(client_id=f"c{evil}", cause=evil),), cause=evil))
    with (going / "clients.csv").open("a", encoding="utf-8") as file:
        file.write(f'2,"e{evil}",rank_2,2,none,cpu,10,,,,,,,,failed,"{evil}"\n')
    text = shown(SnapshotReader(going)(), 200)
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text
    assert "owned" in text and "[red]x" in text, "the words are shown, as words"


def test_a_run_before_its_first_round_is_shown(tmp_path):
    run = RunFolder.create(tmp_path / "run", small())
    text = shown(SnapshotReader(run.path)())
    assert "before round 0 of 1" in text and "Nothing says whether this run goes on" in text
    write_live(run.path, alive(state="meeting", round=0, asked=0, heard=0))
    text = shown(SnapshotReader(run.path)())
    assert "meeting the clients" in text and "Nothing says" not in text
    write_live(run.path, alive(state="evaluating", round=0, num_rounds=1, heard=3, failures=()))
    assert "round 0: 3 of 8 clients evaluated the base" in shown(SnapshotReader(run.path)())


def test_how_a_run_ended(going):
    write_live(going, alive(state="failed", cause="too few nodes came.", round=3))
    sight = SnapshotReader(going)()
    assert sight.over and not sight.finished
    assert "failed after round 2 of 8: too few nodes came" in " ".join(shown(sight).split())
    write_live(going, alive(state="interrupted", cause=""))
    assert "interrupted after round 2 of 8," in shown(SnapshotReader(going)())
    write_live(going, alive(state="finished", round=8))
    sight = SnapshotReader(going)()
    assert sight.over and sight.finished and "finished, round 2 of 8" in shown(sight)


def test_epsilon_and_resent_messages_are_shown_where_there_are_any(tmp_path):
    text = shown(SnapshotReader(written_run(tmp_path / "plain"))())
    assert "epsilon" not in text.splitlines()[-1] and "sent again" not in text
    extra = {at: {"epsilon": 1.5 * at, "resent": at, "as_if_clients": 1000} for at in (1, 2)}
    noisy = written_run(tmp_path / "noisy", extra=extra)
    assert "3 messages sent again, epsilon 3.000 as if 1,000 clients" in shown(
        SnapshotReader(noisy)()
    )
