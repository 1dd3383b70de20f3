"""``live.json``: what it says at every moment of a real run, and that watching changes nothing."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from federation import (
    StopAt,
    Stopped,
    adapter_bytes,
    nobody_joins,
    rounds,
    small,
    untimed,
)
from flexlora.clients.worker import worker_for
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.runs.folder import RunFolder
from flexlora.runs.live_state import LIVE_FILE, LiveState, process_space, read_live, write_live
from flexlora.runs.outcomes import Outcome
from flexlora.server.observing import live as live_module
from flexlora.server.observing.live import (
    MAX_CAUSE_LENGTH,
    MOST_CLIENTS,
    MOST_FAILURES,
    LiveObserver,
)
from flexlora.server.observing.observed import observed
from flexlora.server.observing.observer import Observer, Observers
from flexlora.simulations.simulate import resume, simulate

RUN = small(num_server_rounds=2)


class Witness(Observer):
    """An observer that notes what ``live.json`` says a moment after each event."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def met(self, roster):
        self.note("met", lambda live: live.state == "meeting" and live.classes)

    def round_started(self, server_round, num_rounds, num_clients):
        self.round = server_round
        self.note("started", lambda live: live.round == server_round and live.heard == 0)

    def replied(self, client_id, outcome, cause, late):
        self.note("replied", lambda live: client_id in live.replied)

    def evaluated(self, client_id, cause):
        if self.round == 0:
            self.note("replied", lambda live: client_id in live.replied)

    def round_finished(self, metrics):
        self.note("finished", lambda live: live.state == "waiting")

    def note(self, event, there, seconds=120.0):
        until = time.monotonic() + seconds
        found = read_live(self.folder)
        while self.folder.exists() and time.monotonic() < until:
            if found is not None and there(found):
                break
            time.sleep(0.02)
            found = read_live(self.folder)
        self.seen.append((event, found))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of two rounds and what its live.json said on the way."""
    folder = tmp_path_factory.mktemp("live") / "run"
    witness = Witness(folder)
    simulate(RUN, folder, observer=witness)
    return folder, witness.seen


def no_thread_is_left():
    return not any(thread.name == "flexlora-live" for thread in threading.enumerate())


def test_it_says_where_the_run_is_at_every_event(watched):
    _, seen = watched
    assert seen[0] == ("met", None), "the folder is made once there is somebody to train"
    events = [(event, live.round, live.state) for event, live in seen[1:] if event != "replied"]
    assert events == [
        ("started", 0, "evaluating"),
        ("finished", 0, "waiting"),
        ("started", 1, "training"),
        ("finished", 1, "waiting"),
        ("started", 2, "training"),
        ("finished", 2, "waiting"),
    ]
    trained = [live for event, live in seen if event == "replied" and live.round == 1]
    assert [live.heard for live in trained] == [1, 2, 3, 4]
    assert [live.state for live in trained] == ["training"] * 3 + ["evaluating"]
    for _, live in seen[1:]:
        assert (live.num_rounds, live.asked, live.failed) == (2, 4, 0)
        assert live.classes == {"rank_2": 2, "rank_4": 2} and live.left_out == 0
        assert live.pid == os.getpid() and live.host == process_space()
        assert live.started <= live.round_started <= live.updated <= time.time()


def test_it_says_that_the_run_is_done_and_leaves_no_thread(watched):
    folder, _ = watched
    live = read_live(folder)
    assert live.state == "finished" and live.ended and live.cause == "" and live.round == 2
    assert not list(folder.glob("*.partial")) and no_thread_is_left()
    assert live.updated >= (folder / "adapters" / "global").stat().st_mtime - 0.1


def test_a_run_without_anything_that_watches_leaves_the_same_bytes(watched, tmp_path, monkeypatch):
    folder, _ = watched
    monkeypatch.setattr("flexlora.server.observing.observed.LiveObserver", Deaf)
    simulate(RUN, tmp_path / "run")
    assert not (tmp_path / "run" / LIVE_FILE).exists()
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(folder)
    assert untimed(rounds(tmp_path / "run")) == untimed(rounds(folder))


class Deaf(Observer):
    """Stands for the live observer and hears nothing."""

    def __init__(self, *_, **__):
        pass

    def close(self, *_):
        pass


@pytest.mark.parametrize(
    ("error", "state", "cause"),
    [
        (Stopped("the plug was pulled"), "failed", "Stopped: the plug was pulled"),
        (UserError("what arrived is wrong."), "failed", "what arrived is wrong."),
        (Stopped(), "failed", "Stopped"),
        (KeyboardInterrupt(), "interrupted", ""),
    ],
)
def test_a_run_that_ends_early_says_why_and_a_resume_takes_it_back(error, state, cause, tmp_path):
    with pytest.raises(type(error)):
        simulate(RUN, tmp_path / "run", observer=StopAt("replied", 2, error))
    live = read_live(tmp_path / "run")
    assert (live.state, live.cause, live.round) == (state, cause, 2)
    assert no_thread_is_left()
    witness = Witness(tmp_path / "run")
    resume(tmp_path / "run", observer=witness)
    assert witness.seen[0][1].state == "meeting"
    assert witness.seen[0][1].classes == {"rank_2": 2, "rank_4": 2}
    assert read_live(tmp_path / "run").state == "finished"


def test_a_run_that_nobody_joins_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="4 nodes are connected"):
        nobody_joins(RUN, tmp_path / "run")
    assert not (tmp_path / "run").exists() and no_thread_is_left()


def test_the_folder_of_an_older_run_is_not_written_to_before_it_is_ours(watched, tmp_path):
    """A run that would overwrite another and finds no clients leaves the other's last word."""
    run = RunFolder.create(tmp_path / "run", RUN)
    write_live(run.path, LiveState(state="finished", round=7))
    with pytest.raises(UserError, match="4 nodes are connected"):
        nobody_joins(RUN, run.path, overwrite=True)
    assert read_live(run.path).round == 7
    RunFolder.create(run.path, RUN, overwrite=True)
    assert read_live(run.path) is None


def test_failures_and_late_news_are_told_apart(tmp_path):
    live = LiveObserver(tmp_path)
    live.round_started(3, 8, 3)
    live.replied("a", Outcome.OK, "", False)
    live.replied("b", Outcome.LOST, "Flower error 5: node unavailable", False)
    live.replied("z", Outcome.OK, "late: trained from round 2", True)
    live.replied("y", Outcome.REFUSED, "late: trained from round 2; client y: NaN", True)
    live.resent("c", 2, "Flower error 5: node unavailable")
    live.replied("c", Outcome.OK, "out of memory with 8 rows in a pass: trained with 4", False)
    live.evaluated("a", "no rows")
    live.evaluated("c", "")
    live.close("finished")
    state = read_live(tmp_path)
    assert (state.asked, state.heard, state.failed, state.resent) == (3, 3, 3, 1)
    assert state.replied == ("a", "z", "c")
    assert [failure.client_id for failure in state.failures] == ["b", "y", "a"]


def test_a_round_that_is_skipped_says_so(tmp_path):
    live = LiveObserver(tmp_path)
    live.round_started(3, 8, 0)
    live.round_skipped(3, "skipped: 0 clients can be reached, server.quorum is 2")
    live.close("interrupted")
    assert read_live(tmp_path).heard == 0 and read_live(tmp_path).failures == ()
    live = LiveObserver(tmp_path)
    live.round_started(3, 8, 0)
    live.round_skipped(3, "skipped: 0 clients can be reached")
    assert live._state.cause.startswith("skipped: 0 clients")
    live.round_finished({"round": 3})
    assert live._state.cause == ""
    live.close("finished")


def test_the_lists_are_bounded_and_the_counts_are_not(tmp_path):
    live = LiveObserver(tmp_path)
    live.round_started(1, 2, 2000)
    for number in range(1000):
        live.replied(f"good_{number}", Outcome.OK, "", False)
        live.replied(f"bad_{number}", Outcome.FAILED, "x" * 10_000, False)
    live.close("failed", "y" * 10_000)
    state = read_live(tmp_path)
    assert (state.heard, state.failed) == (2000, 1000)
    assert len(state.replied) == MOST_CLIENTS and state.replied[-1] == "good_999"
    assert len(state.failures) == MOST_FAILURES and state.failures[-1].client_id == "bad_999"
    assert {len(failure.cause) for failure in state.failures} == {MAX_CAUSE_LENGTH}
    assert len(state.cause) == MAX_CAUSE_LENGTH
    assert (tmp_path / LIVE_FILE).stat().st_size < 20_000


def test_every_reader_sees_a_whole_file_and_few_writes(tmp_path, monkeypatch):
    """Thousands of events a second are a few writes; a reader never meets half of one."""
    monkeypatch.setattr(live_module, "SHORTEST_SECONDS", 0.05)
    live = LiveObserver(tmp_path)
    live.round_started(1, 2, 10**6)
    texts, began = set(), time.monotonic()
    # The writer has the time that this loop leaves it: a busy machine takes longer.
    while time.monotonic() - began < (1.0 if len(texts) >= 3 else 120.0):
        for number in range(50):
            live.replied(f"client_{number}", Outcome.OK, "", False)
        if (tmp_path / LIVE_FILE).exists():
            texts.add((tmp_path / LIVE_FILE).read_text())
    took = time.monotonic() - began
    live.close("finished")
    assert all(json.loads(text)["round"] == 1 for text in texts)
    assert 3 <= len(texts) <= took / 0.05 + 2


def test_it_says_that_it_is_alive_while_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(live_module, "SHORTEST_SECONDS", 0.01)
    live = LiveObserver(tmp_path, opened=True, heartbeat=0.05)
    seen, until = set(), time.monotonic() + 120
    while len(seen) < 4 and time.monotonic() < until:
        state = read_live(tmp_path)
        seen |= {state.updated} if state is not None else set()
        time.sleep(0.01)
    live.close("finished")
    assert len(seen) >= 4


def test_a_file_that_is_not_whole_or_not_ours_is_none(tmp_path):
    assert read_live(tmp_path) is None
    write_live(tmp_path, LiveState(state="training", round=3, classes={"rank_2": 4}))
    whole = (tmp_path / LIVE_FILE).read_bytes()
    assert read_live(tmp_path).classes == {"rank_2": 4}
    for text in (
        whole[:50],
        b"",
        b"[1]",
        b'{"round": 1}',
        b'{"state": "x", "round": "y"}',
        b"\xff",
    ):
        (tmp_path / LIVE_FILE).write_bytes(text)
        assert read_live(tmp_path) is None, text
    (tmp_path / LIVE_FILE).write_text('{"state": "training", "of a later version": {}}')
    assert read_live(tmp_path) == LiveState(state="training")


def test_a_disk_that_refuses_is_told_once_and_ends_nothing(tmp_path, caplog):
    (tmp_path / "run" / LIVE_FILE).mkdir(parents=True)  # nothing can be renamed over a folder
    live = LiveObserver(tmp_path / "run", opened=True, heartbeat=0.01)
    time.sleep(0.6)
    live.round_started(1, 2, 3)
    live.close("finished")
    assert [record.message.count("is not written") for record in caplog.records] == [1]


class Broken:
    """An observer that fails at every event."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, event):
        def handler(*args):
            self.calls.append(event)
            raise ValueError("cannot")

        return handler


def test_an_observer_that_fails_is_logged_once_and_the_others_are_told(caplog):
    broken, shown = Broken(), []

    class Good(Observer):
        def met(self, roster):
            shown.append("met")

        def replied(self, client_id, outcome, cause, late):
            shown.append("replied")

    observers = Observers([broken, Good()], Good())
    observers.met(None)
    observers.replied("a", Outcome.OK, "", False)
    observers.resent("a", 2, "lost")
    observers.round_started(1, 2, 3)
    observers.round_finished({"round": 1})
    assert broken.calls == ["met", "replied", "resent", "round_started", "round_finished"]
    assert shown == ["met", "met", "replied", "replied"]
    (record,) = caplog.records
    assert record.getMessage() == "Broken fails, and the run goes on: ValueError: cannot"


def test_what_the_callers_own_observer_raises_passes():
    with pytest.raises(Stopped):
        Observers([], StopAt("replied", 0)).replied("a", Outcome.OK, "", False)


def test_a_live_observer_that_fails_ends_no_run(tmp_path, monkeypatch, caplog):
    def failing(self, *args):
        raise ValueError("cannot")

    for event in ("met", "round_started", "replied", "round_finished"):
        monkeypatch.setattr(LiveObserver, event, failing)
    simulate(small(), tmp_path / "run")
    assert len(rounds(tmp_path / "run")) == 2
    assert len(caplog.records) == 1 and "the run goes on" in caplog.text


def test_the_server_app_of_flower_leaves_it_too(tmp_path):
    """``flwr run`` calls ``app``, which is ``federate`` over Flower's grid; here over ours."""
    from flwr.app import Context, RecordDict

    from flexlora.server.app import app as server_app
    from flexlora.simulations.engine.cohorts import CohortLimits
    from flexlora.simulations.engine.grid import InProcessGrid

    config = small(out=str(tmp_path / "served"))
    grid = InProcessGrid(worker_for(config), limits=CohortLimits(clients=8), wire_dtype="float32")
    context = Context(
        run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config.flat()
    )
    server_app(grid, context)
    assert read_live(tmp_path / "served").state == "finished"


def test_nothing_is_left_open_when_the_endpoint_cannot_listen(tmp_path):
    config = Config.of({"server.metrics-port": 9, "server.metrics-host": "192.0.2.1"})
    with (
        pytest.raises(UserError, match=r"metrics-host is '192\.0\.2\.1'"),
        observed(tmp_path, config, resumed=True),
    ):
        raise AssertionError("it must not come to this")
    assert no_thread_is_left() and list(tmp_path.iterdir()) == []
