"""When clients can be reached: means, swings and stays as configured, answers that fit together."""

import math

import numpy as np
import pytest

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.simulations.world.availability import DAY, Always, Diurnal, Markov, availability_of
from flexlora.simulations.world.traces import Trace, read_trace, state_at

HOUR = 3600.0


def ids(count):
    return [f"client_{k:04}" for k in range(count)]


TRACE = {
    "client_0000": [(0.0, 100.0), (500.0, 900.5)],
    "client_0001": [(50.0, 1000.7)],
    "client_0002": [(0.0, 300.0), (200.0, 400.0), (400.0, 450.0), (600.0, 1000.7)],
    "client_0003": [(10.0, 20.0), (900.0, 1000.7), (0.0, 5.0)],
    "client_0004": [(0.0, 1000.7)],
}

KINDS = {
    "diurnal": lambda: Diurnal(share=0.6, seed=4),
    "often": lambda: Diurnal(share=0.93, seed=4),
    "seldom": lambda: Diurnal(share=0.05, seed=4),
    "markov": lambda: Markov(share=0.3, online_seconds=2 * HOUR, seed=4),
    "trace": lambda: Trace(TRACE, ids(5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_holds_until_it_is_said_to_change_and_is_the_other_one_there(kind):
    availability, generator = KINDS[kind](), np.random.default_rng(0)
    for client_id in ids(4):
        for seconds in generator.uniform(0, 20 * DAY, size=40):
            state, change = (
                availability.online(client_id, seconds),
                availability.changes_at(client_id, seconds),
            )
            assert change > seconds
            between = generator.uniform(seconds, change, size=5)
            inside = [*between, math.nextafter(change, -math.inf)]
            assert all(availability.online(client_id, t) == state for t in inside)
            assert availability.online(client_id, change) != state
            assert availability.changes_at(client_id, inside[0]) == change


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_what_was_asked_before(kind):
    times = np.random.default_rng(1).uniform(0, 30 * DAY, size=50)
    forward, shuffled, alone = KINDS[kind](), KINDS[kind](), KINDS[kind]()
    asked = {(i, t): forward.online(i, t) for i in ids(4) for t in times}
    order = np.random.default_rng(2).permutation(len(asked))
    for k in order:
        client_id, seconds = list(asked)[k]
        assert shuffled.online(client_id, seconds) == asked[client_id, seconds]
    assert [alone.online("client_0002", t) for t in times] == [
        asked["client_0002", t] for t in times
    ]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["diurnal", "markov"])
def test_the_mean_over_clients_and_time_is_the_share(kind, share):
    """Each client at one time of its own, so that the answers are independent draws."""
    config = Config.of(
        {"population.availability": kind, "population.online-share": share, "seed": 7}
    )
    availability = availability_of(config, ids(3000))
    times = np.random.default_rng(3).uniform(0, 10 * DAY, size=3000)
    online = [availability.online(i, t) for i, t in zip(ids(3000), times, strict=True)]
    assert np.mean(online) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 3000))


@pytest.mark.parametrize("kind", ["diurnal", "markov"])
def test_one_client_over_a_long_time_has_the_share_too(kind):
    availability = KINDS[kind]()
    share, times = (0.6, 400 * DAY) if kind == "diurnal" else (0.3, 400 * DAY)
    seconds, total = 0.0, 0.0
    while seconds < times:
        change = min(availability.changes_at("client_0009", seconds), times)
        total += (change - seconds) * availability.online("client_0009", seconds)
        seconds = change
    assert total / times == pytest.approx(share, abs=0.04)


def test_at_night_four_times_as_many_are_there_as_in_the_afternoon():
    availability = Diurnal(share=0.5, seed=1)
    hours = np.array(
        [
            np.mean([availability.online("client_0005", d * DAY + h * HOUR) for d in range(400)])
            for h in range(24)
        ]
    )
    peak = int(hours.argmax())
    assert hours.max() == pytest.approx(0.8, abs=0.09) and hours.min() == pytest.approx(
        0.2, abs=0.09
    )
    wave = 0.5 + 0.3 * np.cos(2 * np.pi * (np.arange(24) - peak) / 24)
    assert np.abs(hours - wave).max() < 0.17  # within two hours of the true peak and noise


def test_time_zones_spread_the_peaks_around_the_clock():
    availability = Diurnal(share=0.5, seed=1)
    starts = [availability.changes_at(i, 0.0) for i in ids(300)]
    by_hour = np.histogram(np.array(starts) % DAY, bins=8, range=(0, DAY))[0]
    assert by_hour.min() > 10
    midnight = np.mean([availability.online(i, 0.0) for i in ids(1500)])
    assert midnight == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(1500))


def test_a_share_that_leaves_little_room_swings_less():
    assert Diurnal(share=0.9, seed=0).swing == pytest.approx(1 / 0.9 - 1)
    assert Diurnal(share=0.5, seed=0).swing == 0.6
    night = Diurnal(share=0.9, seed=0)
    lowest = min(
        np.mean([night.online("a", d * DAY + h * HOUR) for d in range(200)]) for h in range(24)
    )
    assert lowest == pytest.approx(0.8, abs=0.12)


def test_markov_clients_stay_online_for_the_hours_asked_and_offline_to_match():
    availability = Markov(share=0.25, online_seconds=2 * HOUR, seed=11)
    stays = {True: [], False: []}
    for client_id in ids(60):
        seconds = availability.changes_at(client_id, 0.0)
        for _ in range(60):
            change = availability.changes_at(client_id, seconds)
            stays[availability.online(client_id, seconds)].append(change - seconds)
            seconds = change
    for state, mean in ((True, 2 * HOUR), (False, 6 * HOUR)):
        drawn = np.array(stays[state])
        assert drawn.mean() == pytest.approx(mean, rel=4 / np.sqrt(len(drawn)))
        # Exponential: the deviation is the mean, and exp(-1) of them are longer than it.
        assert drawn.std() == pytest.approx(mean, rel=0.15)
        assert np.mean(drawn > mean) == pytest.approx(math.exp(-1), abs=0.04)


@pytest.mark.parametrize(
    "availability",
    [Always(), Diurnal(share=1.0, seed=0), Markov(share=1.0, online_seconds=60, seed=0)],
    ids=["always", "diurnal", "markov"],
)
def test_those_who_never_leave_never_change(availability):
    for seconds in (0.0, 1.5, 1e7):
        assert (
            availability.online("a", seconds) and availability.changes_at("a", seconds) == math.inf
        )


def test_other_seeds_and_other_clients_have_other_days():
    for make in (Diurnal, lambda **k: Markov(online_seconds=HOUR, **k)):
        changes = {
            make(share=0.5, seed=seed).changes_at(client_id, 0.0)
            for seed in range(5)
            for client_id in ids(5)
        }
        assert len(changes) >= 24  # two may change at the same whole hour


def test_a_trace_is_followed_to_the_second_and_begins_anew():
    trace = Trace(TRACE, ids(5))
    for turn in (0, 1, 2, 1000):
        start = turn * 1000.7
        assert trace.online("client_0000", start + 50) and not trace.online(
            "client_0000", start + 100
        )
        assert trace.changes_at("client_0000", start + 50) == pytest.approx(start + 100)
        assert trace.changes_at("client_0000", start + 950) == pytest.approx(start + 1000.7)
        assert not trace.online("client_0001", start + 49.9) and trace.online(
            "client_0001", start + 50
        )


def test_intervals_that_overlap_or_meet_at_the_traces_end_are_one():
    trace = Trace(TRACE, ids(5))
    assert trace.changes_at("client_0002", 0.0) == 450.0
    assert trace.changes_at("client_0002", 700.0) == pytest.approx(1000.7 + 450)
    assert trace.changes_at("client_0003", 950.0) == pytest.approx(1000.7 + 5)
    assert trace.online("client_0004", 77.0) and trace.changes_at("client_0004", 77.0) == math.inf


def test_clients_of_another_name_are_dealt_the_traces_in_order():
    trace = Trace(TRACE, ["b", "a", *(f"z{k}" for k in range(5))])
    for name, followed in (("a", 0), ("b", 1), ("z0", 2), ("z3", 0), ("z4", 1)):
        for seconds in (7.0, 60.0, 460.0, 777.0, 950.0):
            named = Trace(TRACE, ids(5)).online(f"client_{followed:04}", seconds)
            assert trace.online(name, seconds) == named


def test_more_clients_in_a_trace_than_here_do_no_harm():
    few = Trace(TRACE, ["client_0001"])
    assert few.period == 1000.7 and not few.online("client_0001", 10.0)


def test_windows_that_touch_are_one():
    windows = [(1.0, 2.0), (3.0, 4.0), (4.0, 5.0)]
    assert [state_at(windows, t) for t in (0.0, 1.0, 2.0, 3.5, 4.0, 9.0)] == [
        (False, 1.0),
        (True, 2.0),
        (False, 3.0),
        (True, 5.0),
        (True, 5.0),
        (False, math.inf),
    ]


def test_a_trace_from_a_file(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("client_id, start_seconds, end_seconds\na,0,1.5\nb,10,20\na,4,8\n", "utf-8")
    assert read_trace(str(file)) == {"a": [(0.0, 1.5), (4.0, 8.0)], "b": [(10.0, 20.0)]}
    config = Config.of({"population.availability": "trace", "population.trace": str(file)})
    availability = availability_of(config, ["a", "b"])
    assert availability.online("b", 15.0) and availability.changes_at("a", 8.0) == 20.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client_id,start,end\na,0,1\n", "has no column start_seconds, expected client_id, "),
        ("", "has no column client_id"),
        ("client_id,start_seconds,end_seconds\n", "has no rows"),
        ("client_id,start_seconds,end_seconds\na,5,5\n", "line 2: the interval is from '5' to '5'"),
        ("client_id,start_seconds,end_seconds\na,-1,5\n", "is from '-1' to '5', expected seconds"),
        ("client_id,start_seconds,end_seconds\na,0,inf\n", "is from '0' to 'inf'"),
        ("client_id,start_seconds,end_seconds\na,0,noon\n", "line 2: .* to 'noon'"),
        ("client_id,start_seconds,end_seconds\na,0\n", "is from '0' to ''"),
        ("client_id,start_seconds,end_seconds\n,0,1\n", "line 2: there is no client_id"),
        ("client_id,start_seconds,end_seconds\na,0,9\n", "names 1 of the 3 clients and has no row"),
    ],
)
def test_traces_that_make_no_sense_are_refused(tmp_path, text, message):
    file = tmp_path / "trace.csv"
    file.write_text(text, "utf-8")
    config = Config.of({"population.availability": "trace", "population.trace": str(file)})
    with pytest.raises(UserError, match=message):
        availability_of(config, ["a", "a1", "a2"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"availability": "trace"}, "is 'trace' and population.trace is empty"),
        ({"availability": "trace", "trace": "none.csv"}, "'none.csv' does not exist"),
        ({"availability": "trace", "trace": "."}, "'.' cannot be read"),
        ({"trace": "x.csv"}, "population.trace is 'x.csv', which population.availability=always"),
        ({"availability": "diurnal", "online-hours": 1.0}, "online-hours is 1.0, which .*=diurnal"),
        ({"online-share": 0.5}, "set population.availability=diurnal or markov, or leave the key"),
    ],
)
def test_keys_that_nothing_reads_are_refused(keys, message):
    values = {f"population.{key}": value for key, value in keys.items()}
    with pytest.raises(UserError, match=message):
        availability_of(Config.of(values), ["a"])
