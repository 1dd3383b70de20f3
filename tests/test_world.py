"""Simulated time: arrivals in their order, deadlines, drop-outs, quorum, over-selection, resume."""

from __future__ import annotations

import math

import pytest
from federation import adapter_bytes, client_rows, rounds, small, untimed
from flexlora.simulations.populations import Population
from flexlora.simulations.simulate import resume, simulate
from flexlora.simulations.world import LOST_AFTER, NOMINAL_SECONDS, Effort, world_of

from flexlora.errors import UserError
from flexlora.ranks import RankClass

IDS = [f"client_{k:02d}" for k in range(24)]


def world(**changes):
    config = small(clients__count=24, **changes)
    return world_of(config, Population.from_config(config, IDS))


def effort(client_id, server_round=1, **changes):
    values = {"tokens": 1000, "steps": 2, "bytes_down": 10_000, "bytes_up": 10_000}
    return Effort(
        client_id=client_id,
        server_round=server_round,
        rank_class=RankClass.of(4),
        quantization="none",
        **{**values, **changes},
    )


def test_there_is_no_world_where_nobodys_time_matters():
    assert world() is None
    assert world(population__examples="5") is None
    assert world(population__dropout=0.5) is not None


def test_time_passes_from_one_arrival_to_the_next():
    here = world(population__straggler_share=0.5, population__straggler_slowdown=4.0)
    for client_id in IDS:
        assert here.send(f"to {client_id}", effort(client_id))
    assert here.now() == 0.0 and not any(here.arrived(f"to {client_id}") for client_id in IDS)
    here.wait(1e9)
    assert here.now() == NOMINAL_SECONDS
    early = [client_id for client_id in IDS if here.arrived(f"to {client_id}")]
    here.wait(100.0)
    assert here.now() == 100.0, "never beyond what was asked for"
    here.wait(1e9)
    assert here.now() == 4 * NOMINAL_SECONDS and 0 < len(early) < 24
    assert all(here.arrived(f"to {client_id}") for client_id in IDS)
    assert {here.spent(c).seconds for c in early} == {NOMINAL_SECONDS}


def test_who_drops_out_is_known_a_minute_later():
    here = world(population__dropout=1.0)
    assert not here.send("m", effort("client_00"))
    left = here.spent("client_00").seconds
    assert 0 <= left < NOMINAL_SECONDS
    here.wait(1e9)
    assert here.now() == pytest.approx(left + LOST_AFTER)
    assert here.take("m") == f"the client left after {left:.0f} s"


def test_who_goes_offline_in_the_middle_sends_nothing():
    here = world(population__availability="markov", population__online_hours=0.02)
    changes = here.population.availability.changes_at
    answers = {c: here.send(c, effort(c)) for c in IDS if here.online(c)}
    assert answers == {c: changes(c, 0.0) >= NOMINAL_SECONDS for c in answers}
    assert set(answers.values()) == {True, False}


def test_waiting_without_anybody_on_the_way_goes_on_to_the_next_change():
    here = world(population__availability="markov")
    changes = [here.population.availability.changes_at(c, 0.0) for c in IDS]
    here.wait(math.inf)
    assert here.now() == min(changes)


def test_devices_decide_who_comes_first(tmp_path):
    """A hundred times the arithmetic, far less time; seconds, joules and devices on record."""
    config = small(
        population__devices="raspberry-pi-5-8gb:0.5,h100-sxm:0.5",
        population__clock_model="meta-llama/Llama-2-7b-hf",
    )
    simulate(config, tmp_path / "run")
    rows, (_, first) = client_rows(tmp_path / "run", 1), rounds(tmp_path / "run")
    by_device = {}
    for row in rows:
        by_device.setdefault("raspberry" in row["device"].lower(), []).append(row)
    slow, fast = ([float(r["simulated_seconds"]) for r in by_device[k]] for k in (True, False))
    assert len(slow) == len(fast) == 2 and min(slow) > max(fast)
    assert first["simulated_seconds"] == pytest.approx(max(slow))
    joules = sum(float(row["joules"]) for row in rows)
    assert first["joules"] == pytest.approx(joules) and joules > 0


def test_the_clock_changes_no_number_of_the_training(tmp_path):
    plain, timed = tmp_path / "plain", tmp_path / "timed"
    simulate(small(num_server_rounds=2), plain)
    config = small(num_server_rounds=2, population__devices="rtx-4090:0.5,raspberry-pi-5-8gb:0.5")
    simulate(config, timed)
    assert adapter_bytes(plain) == adapter_bytes(timed)


def test_a_deadline_leaves_the_slow_out_and_their_updates_come_late(tmp_path):
    config = small(
        num_server_rounds=2,
        population__straggler_share=0.5,
        population__straggler_slowdown=2.0,
        server__round_timeout_seconds=1.5 * NOMINAL_SECONDS,
    )
    simulate(config, tmp_path / "run")
    first, second = (client_rows(tmp_path / "run", r) for r in (1, 2))
    slow = {row["client_id"] for row in first if row["status"] == "failed"}
    assert 0 < len(slow) < 4
    assert all("no reply within 90 s" in r["cause"] for r in first if r["client_id"] in slow)
    late = {row["client_id"] for row in second if "late: trained from round 0" in row["cause"]}
    assert late == slow
    assert rounds(tmp_path / "run")[1]["simulated_seconds"] == pytest.approx(90.0)


def test_over_selection_stops_at_the_first_that_are_enough(tmp_path):
    config = small(
        fraction_train=0.5,
        server__over_selection=1.0,
        population__straggler_share=0.5,
        population__straggler_slowdown=3.0,
    )
    simulate(config, tmp_path / "run")
    rows, metrics = client_rows(tmp_path / "run", 1), rounds(tmp_path / "run")[1]
    statuses = sorted(row["status"] for row in rows)
    assert statuses == ["not needed", "not needed", "ok", "ok"]
    assert metrics["clients_ok"] == 2 and metrics["clients_failed"] == 0
    assert metrics["simulated_seconds"] == pytest.approx(NOMINAL_SECONDS)


def test_a_round_below_its_quorum_changes_nothing_and_says_so(tmp_path):
    config = small(num_server_rounds=2, population__dropout=0.7, server__quorum=3)
    simulate(config, tmp_path / "run")
    for metrics in rounds(tmp_path / "run")[1:]:
        counted = [
            r for r in client_rows(tmp_path / "run", metrics["round"]) if r["status"] == "ok"
        ]
        assert len(counted) < 3
        expected = f"skipped: {len(counted)} updates came, server.quorum is 3"
        assert expected in metrics["skipped"]
        assert metrics["effective_rank"] == 0 and metrics["round"] in (1, 2)
    left = [r for r in client_rows(tmp_path / "run", 1) if r["status"] == "failed"]
    assert left and all("the client left after" in row["cause"] for row in left)


def test_fewer_reachable_than_the_quorum_is_a_skipped_round(tmp_path):
    config = small(
        population__availability="markov",
        population__online_share=0.02,
        server__quorum=4,
        server__wait_seconds=600.0,
    )
    simulate(config, tmp_path / "run")
    (_, metrics) = rounds(tmp_path / "run")
    assert "clients can be reached, server.quorum is 4" in metrics["skipped"]
    assert metrics["simulated_seconds"] == pytest.approx(600.0)
    assert client_rows(tmp_path / "run", 1) == []


def test_a_resumed_run_goes_on_at_its_own_time_with_its_own_memory(tmp_path):
    from federation import StopAt, Stopped

    config = small(
        num_server_rounds=3,
        fraction_train=0.5,
        sampling__policy="utility",
        population__availability="markov",
        population__online_hours=0.5,
        population__devices="rtx-4090:0.5,raspberry-pi-5-8gb:0.5",
        population__links="wifi:1.0",
    )
    simulate(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        simulate(config, tmp_path / "halved", observer=StopAt("round_started", 3, Stopped))
    resume(tmp_path / "halved")
    assert adapter_bytes(tmp_path / "whole") == adapter_bytes(tmp_path / "halved")
    for read in (rounds, client_rows):
        whole, halved = untimed(read(tmp_path / "whole")), untimed(read(tmp_path / "halved"))
        assert whole == halved


def test_a_population_that_cannot_be_is_refused_before_any_work(tmp_path):
    for changes, message in (
        ({"population__devices": "rtx-4090:0.5"}, "adds up to 0.5"),
        ({"population__devices": "rtx-4091:1.0"}, "'rtx-4091' is not known"),
        ({"population__links": "wifi:1.0"}, "population.devices is not set"),
    ):
        with pytest.raises(UserError, match=message):
            simulate(small(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
