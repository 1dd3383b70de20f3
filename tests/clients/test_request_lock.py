"""One request at a time: waiting, refusals, callers that disconnect, and how a trainer stops."""

from __future__ import annotations

import threading
import time

import pytest

from flexlora.clients.trainer.client import call_of, health, questions, trainer_on
from flexlora.clients.trainer.request_lock import Busy, RequestLock
from flexlora.clients.trainer.service import Limits
from flexlora.clients.worker import Worker
from packed import trained
from trainers import (
    cause_of,
    evaluate_message,
    resident,
    run_config,
    train_message,
    values_of,
    write_rows,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


@pytest.fixture
def held(monkeypatch):
    """A training that begins and waits: ``begun`` is set, ``go`` lets it end."""
    begun, go, plain = threading.Event(), threading.Event(), Worker.train

    def train(self, jobs):
        begun.set()
        assert go.wait(240)
        return plain(self, jobs)

    monkeypatch.setattr(Worker, "train", train)
    yield begun, go
    go.set()


def in_thread(work):
    """``work()`` in a thread; its result is in the list once the thread has ended."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


def test_a_second_request_waits_for_the_first(data, tmp_path, held):
    begun, go = held
    config = run_config()
    with resident(data, tmp_path / "kept") as made:
        first, one = in_thread(lambda: made.ask(train_message(config), config))
        assert begun.wait(120)
        second, two = in_thread(lambda: made.ask(evaluate_message(config), config))
        third, three = in_thread(lambda: made.ask(train_message(config), config))
        time.sleep(0.3)
        assert health(made.path).doing == "train, run 7, round 1" and not two and not three
        go.set()
        for thread in (first, second, third):
            thread.join(120)
        assert [cause_of(reply[0]) for reply in (one, two, three)] == ["", "", ""]
        # The third was the same as the first: when its turn came, it had been done.
        assert (made.trainer.totals.trained, made.trainer.totals.from_disk) == (1, 1)
        assert values_of(one[0]) == values_of(three[0])


def test_who_waits_too_long_is_told_for_whom_and_the_kept_are_answered_meanwhile(
    data, tmp_path, held
):
    begun, go = held
    config, other = run_config(), run_config(seed=2)
    with resident(data, tmp_path / "kept", limits=Limits(wait_seconds=0.3)) as made:
        go.set()
        kept = made.ask(train_message(config), config)
        go.clear(), begun.clear()
        working, done = in_thread(lambda: made.ask(train_message(other), other))
        assert begun.wait(120)
        refused = cause_of(made.ask(evaluate_message(config), config))
        assert "busy (train, run 7, round 1" in refused and "waited 0 s" in refused
        assert values_of(made.ask(train_message(config), config)) == values_of(kept)
        assert not done
        go.set()
        working.join(120)


def test_a_training_whose_caller_has_gone_is_finished_and_kept(data, tmp_path, held):
    begun, go = held
    config = run_config()
    message = train_message(config)
    with resident(data, tmp_path / "kept") as made:
        with trainer_on(made.path) as stub:
            call = call_of(message, made.context(config))
            answers = stub.Train(questions(call, message.content))
            assert begun.wait(120)
            answers.cancel()
        go.set()
        reply = made.ask(train_message(config), config)
        assert cause_of(reply) == ""
        assert (made.trainer.totals.trained, made.trainer.totals.from_disk) == (1, 1)


def test_a_stop_lets_the_training_end_and_takes_no_more(data, tmp_path, held):
    begun, go = held
    config = run_config()
    with resident(data, tmp_path / "kept") as made:
        working, done = in_thread(lambda: made.ask(train_message(config), config))
        assert begun.wait(120)
        stopping, ended = in_thread(lambda: made.stop(120.0))
        while not health(made.path).stopping:
            time.sleep(0.02)
        refused = made.ask(evaluate_message(config), config)
        assert "the trainer is stopping" in cause_of(refused)
        go.set()
        working.join(120), stopping.join(120)
        assert ended == [True] and cause_of(done[0]) == "" and trained(done[0])
        assert not made.path.exists()


def test_a_stop_does_not_wait_longer_than_its_grace(data, tmp_path, held):
    begun, go = held
    config = run_config()
    with resident(data, tmp_path / "kept") as made:
        working, done = in_thread(lambda: made.ask(train_message(config), config))
        assert begun.wait(120)
        assert made.stop(0.2) is False
        working.join(120)
        assert "went away while it was asked" in cause_of(done[0]) and not made.path.exists()
        go.set()


def test_few_requests_wait_and_the_lock_can_be_closed():
    lock = RequestLock(wait_seconds=0.0, most_waiting=1)
    with lock.held("one thing"):
        assert lock.current[0] == "one thing"
        with pytest.raises(Busy, match=r"busy \(one thing, for 0 s\); this request waited 0 s"):
            lock.held("another").__enter__()
        lock.most_waiting = 0
        with pytest.raises(Busy, match="and 0 more requests wait"):
            lock.held("another").__enter__()
        lock.most_waiting, lock.wait_seconds = 1, 9.0
        with pytest.raises(Busy, match="the caller has gone"):
            lock.held("another", alive=lambda: False).__enter__()
        assert lock.close(0.0) is False
        with pytest.raises(Busy, match="the trainer is stopping"):
            lock.held("another").__enter__()
    assert lock.current == ("", 0.0) and lock.close(0.0) is True
