"""Hours, quotas and the seconds of a request, on a clock that the test moves."""

from __future__ import annotations

import json
import time

import pytest
from flwr.app import MessageType
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.clients.trainer import quota_ledger
from flexlora.clients.trainer.hours import Hours
from flexlora.clients.trainer.owner_rules import OwnerRules
from flexlora.clients.trainer.quota_ledger import QuotaLedger, Use
from flexlora.errors import UserError
from trainers import (
    allowed_by,
    cause_of,
    evaluate_message,
    resident,
    run_config,
    train_message,
    write_rows,
)

DAY = 86400.0
NOON = time.mktime((2026, 11, 30, 12, 0, 0, 0, 0, -1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


# Hours


def at(hour, minute=0):
    return time.mktime((2026, 11, 30, hour, minute, 0, 0, 0, -1))


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("22:00-06:00", [(22, 0), (23, 59), (0, 0), (5, 59)], [(6, 0), (12, 0), (21, 59)]),
        ("9:30-17:00", [(9, 30), (16, 59)], [(9, 29), (17, 0), (0, 0)]),
        ("22:00-06:00, 12:00-13:00", [(12, 0), (3, 0)], [(13, 0), (11, 59)]),
        ("20:00-24:00", [(23, 59)], [(0, 0), (19, 59)]),
        ("00:00-00:00", [(0, 0), (12, 0)], []),
        ("", [(0, 0), (12, 0)], []),
    ],
)
def test_hours(text, inside, outside):
    hours = Hours.parse(text, "request.hours")
    assert all(hours.has(at(*clock)) for clock in inside)
    assert not any(hours.has(at(*clock)) for clock in outside)


@pytest.mark.parametrize(
    "text", ["22-6", "25:00-06:00", "22:60-06:00", "22:00", "22:00-06:00;", ","]
)
def test_hours_that_are_none(text):
    with pytest.raises(UserError, match=r"request.hours is .*expected spans of local time like"):
        Hours.parse(text, "request.hours")


# The ledger


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 40 * DAY), st.floats(0, 100), st.integers(0, 9)), max_size=12)
)
def test_no_span_holds_more_than_the_ledger_says(tmp_path_factory, uses):
    """And what it says is true of a span that is an hour longer."""
    path = tmp_path_factory.mktemp("ledger") / "quotas.json"
    ledger = QuotaLedger(path)
    for when, seconds, rows in uses:
        ledger.add(Use(seconds=seconds, requests=1, rows=rows), NOON + when)
    again = QuotaLedger(path)
    now = NOON + 40 * DAY
    for span in (DAY, 7 * DAY):
        used = ledger.used(span, now)
        assert used == again.used(span, now)
        exact = [rows for when, _, rows in uses if when > 40 * DAY - span]
        longer = [rows for when, _, rows in uses if when > 40 * DAY - span - 3600]
        assert sum(exact) <= used.rows <= sum(longer)
        assert len(exact) <= used.requests <= len(longer)


def test_a_clock_that_is_set_back_and_one_that_was_wrong_forget_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(quota_ledger, "HOURS_KEPT", 200)
    ledger = QuotaLedger(tmp_path / "quotas.json")
    ledger.add(Use(requests=1), NOON)
    ledger.add(Use(requests=1), NOON + 400 * DAY)  # a wrong clock, for one request
    assert ledger.used(DAY, NOON).requests == 2
    for hour in range(250):
        ledger.add(Use(requests=1), NOON + 3600.0 * hour)
    last = NOON + 3600.0 * 249
    assert ledger.used(7 * DAY, last).requests in (7 * 24 + 1, 7 * 24 + 2)
    assert len(json.loads(ledger.path.read_text())["hours"]) == 200


DAMAGED = {
    "cut": lambda text: text[:-5],
    "empty": lambda text: "",
    "another format": lambda text: text.replace('"format": 1', '"format": 2'),
    "negative": lambda text: text.replace("[3.5,", "[-3.5,"),
    "no numbers": lambda text: text.replace("[3.5, 1, 7]", "[3.5, true, 7]"),
    "infinite": lambda text: text.replace("3.5", "Infinity"),
    "a list": lambda text: "[]",
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_refused_and_not_begun_anew(what, tmp_path):
    path = tmp_path / "quotas.json"
    QuotaLedger(path).add(Use(seconds=3.5, requests=1, rows=7), NOON)
    whole = path.read_text()
    assert QuotaLedger(path).used(DAY, NOON) == Use(seconds=3.5, requests=1, rows=7)
    path.write_text(DAMAGED[what](whole))
    assert path.read_text() != whole
    with pytest.raises(UserError, match=r"quotas.json' cannot be read.*Remove it to count from"):
        QuotaLedger(path)
    path.unlink()
    assert QuotaLedger(path).used(DAY, NOON) == Use()


# The rules


class Clock:
    def __init__(self, now=NOON):
        self.now = now

    def __call__(self):
        return self.now


def rules_of(tmp_path, clock, **allowed):
    return OwnerRules(allowed_by(**allowed), QuotaLedger(tmp_path / "quotas.json"), now=clock)


ROWS = {"train": 12, "validation": 6}


def begun(rules, config, kind=MessageType.TRAIN):
    with rules.begin(kind, config, ROWS) as running:
        return running


@pytest.mark.parametrize("span", ["day", "week"])
def test_a_quota_of_requests_and_of_rows_over_a_restart(span, tmp_path):
    clock, length = Clock(), {"day": DAY, "week": 7 * DAY}[span]
    config = run_config(train__max_steps=5, train__per_device_train_batch_size=8)
    taken = 12 + 12 + 8  # epochs of 8 and 4 rows
    for key, allowed, words in (
        ("requests", 2, f"allows 2 requests a {span}, 2 are used, and this request takes 1"),
        ("rows", 2 * taken, f"allows 64 rows a {span}, 64 are used, and this request takes 32"),
    ):
        folder = tmp_path / key
        for _ in range(2):
            begun(rules_of(folder, clock, **{f"{span}.{key}": allowed}), config)
        rules = rules_of(folder, clock, **{f"{span}.{key}": allowed})
        before = (folder / "quotas.json").read_bytes()
        with pytest.raises(UserError, match=rf"^this node's owner {words} .{span}.{key}.\.$"):
            begun(rules, config)
        assert (folder / "quotas.json").read_bytes() == before
        assert begun(rules, config, MessageType.QUERY) is None  # what a node can is no work
        if key == "rows":
            begun(rules, config, MessageType.EVALUATE)
        clock.now += length + 3600
        begun(rules, config)
        clock.now = NOON


def test_personal_steps_count_as_rows(tmp_path):
    rules = rules_of(tmp_path, Clock())
    begun(rules, run_config(train__max_steps=1, personal__rank=2, personal__max_steps=2))
    used = {key: used for key, used, _ in rules.quotas()}
    size = run_config().train.examples_per_step
    assert used["day.rows"] == used["week.rows"] == min(size, 12) + min(2 * size, 12)


def test_a_quota_as_long_as_its_span_is_none(tmp_path):
    clock = Clock()
    rules = rules_of(tmp_path, clock)
    rules.ledger.add(Use(seconds=25 * 3600.0), clock.now)
    begun(rules, run_config())
    less = rules_of(tmp_path, clock, **{"day.seconds": 25 * 3600.0 - 3601})
    with pytest.raises(UserError, match=r"allows 86,399 seconds a day, 90,0.. are used"):
        begun(less, run_config())


def test_nothing_is_done_that_cannot_be_counted(tmp_path, monkeypatch):
    rules = rules_of(tmp_path, Clock())

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexlora.clients.trainer.quota_ledger.write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        begun(rules, run_config())
    assert rules.quotas()[1][1] == 0.0


# A trainer


def test_a_request_outside_the_hours_is_refused_and_repeated_ones_are_answered(data, tmp_path):
    config = run_config(train__max_steps=2)
    with resident(data, tmp_path / "kept", allowed={"request.hours": "22:00-06:00"}) as made:
        clock = made.trainer.rules.now = Clock(at(23))
        assert cause_of(made.ask(train_message(config), config)) == ""
        clock.now = at(12, 5)
        cause = cause_of(made.ask(train_message(config, server_round=2), config))
        assert cause == (
            "it is 12:05 at this node, and its owner allows requests at 22:00-06:00 only "
            "(request.hours)."
        )
        assert cause_of(made.ask(train_message(config), config)) == ""
        assert (made.trainer.totals.trained, made.trainer.totals.from_disk) == (1, 1)


def test_a_training_that_takes_too_long_is_ended_between_two_passes(data, tmp_path):
    """The steps done do not count; the seconds do; the next request finds the node as it was."""
    config = run_config(train__max_steps=90_000)
    with resident(data, tmp_path / "kept", allowed={"request.seconds": 1.0}) as made:
        began = time.monotonic()
        reply = made.ask(train_message(config), config)
        assert time.monotonic() - began < 60
        cause = cause_of(reply)
        assert "update" not in reply and "of 90000 steps, which do not count: the request" in cause
        assert "this node's owner allows 1 at most (request.seconds)" in cause
        assert reply["report"]["client-id"] == "site"
        used = {key: used for key, used, _ in made.trainer.rules.quotas()}
        assert used["day.seconds"] >= 1.0 and used["day.requests"] == 1
        made.trainer.limits = made.trainer.rules.limits = allowed_by()
        short = run_config(train__max_steps=2)
        after = made.ask(train_message(short), short)
        assert made.trainer.totals.trained == 1
    with resident(data, tmp_path / "fresh") as made:
        fresh = made.ask(train_message(short), short)
    arrays = [{key: array.data for key, array in x["update"].items()} for x in (after, fresh)]
    assert arrays[0] == arrays[1]


def test_an_evaluation_that_takes_too_long_is_ended_too(data, tmp_path):
    config = run_config()
    with resident(data, tmp_path / "kept", allowed={"request.seconds": 1e-6}) as made:
        cause = cause_of(made.ask(evaluate_message(config), config))
    assert "this node's owner allows 1e-06 at most (request.seconds)" in cause


@pytest.mark.parametrize("what", ["hours", "quota"])
def test_a_training_ends_with_the_hours_and_with_the_quota(what, data, tmp_path):
    config = run_config(train__max_steps=90_000)
    allowed = {"hours": {"request.hours": "22:00-06:00"}, "quota": {"day.seconds": 1.0}}[what]
    with resident(data, tmp_path / "kept", allowed=allowed) as made:
        clock = made.trainer.rules.now = Clock(at(23))
        if what == "hours":
            times = iter([at(5, 59)] * 12)
            clock = made.trainer.rules.now = lambda: next(times, at(6))
        cause = cause_of(made.ask(train_message(config), config))
        words = {"hours": "it is 06:00 at this node", "quota": "allows 1 seconds a day"}[what]
        assert words in cause and "of 90000 steps, which do not count" in cause, cause
        again = cause_of(made.ask(train_message(config), config))
        assert words in again and "steps" not in again
    with resident(data, tmp_path / "kept", allowed=allowed) as made:  # over a restart
        made.trainer.rules.now = clock
        assert cause_of(made.ask(train_message(config), config)) == again
