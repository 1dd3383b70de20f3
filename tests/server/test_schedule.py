"""When the next run of a federation starts."""

from __future__ import annotations

import time

import pytest

from flexlora.errors import UserError
from flexlora.server.following.schedule import Schedule


def at(hour, minute=0, day=1):
    return time.mktime((2026, 12, day, hour, minute, 0, 0, 0, -1))


def test_every_and_after_say_when_the_next_run_starts():
    assert Schedule.of({}).next_start(at(9), 0.0) == at(9)
    daily = Schedule.of({"every": "1d"})
    assert daily.next_start(at(9), 0.0) == at(9)
    assert daily.next_start(at(12), at(9)) == at(9, day=2)
    assert daily.next_start(at(12, day=3), at(9)) == at(12, day=3), "a missed start is now"
    nightly = Schedule.of({"every": "1d", "after": "02:00"})
    assert nightly.next_start(at(9), 0.0) == at(2, day=2)
    assert nightly.next_start(at(5, day=2), at(2, day=2)) == at(2, day=3)
    assert nightly.next_start(at(5, day=2), at(2, day=2)) != at(2, day=2), "once a night"
    weekly = Schedule.of({"every": "1w", "after": "02:00"})
    assert weekly.next_start(at(5), at(2)) == at(2, day=8)
    once = Schedule.of({"after": "02:30"})
    assert once.every == 0.0 and once.next_start(at(1), 0.0) == at(2, 30)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"evry": "1d"}, "unknown key 'schedule.evry'. Did you mean 'every'"),
        ({"every": "daily"}, "schedule.every is 'daily', expected a number and m, h, d or w"),
        ({"every": "0d"}, "schedule.every is '0d'"),
        ({"after": "25:00"}, "schedule.after is '25:00', expected a time such as 02:00"),
        ({"start-from": "adaptor"}, "start-from is 'adaptor'.* Did you mean 'adapter'"),
    ],
)
def test_a_schedule_that_is_none_is_one_sentence(table, sentence):
    with pytest.raises(UserError, match=sentence):
        Schedule.of(table)
