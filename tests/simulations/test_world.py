"""Simulated time: arrivals in their order, deadlines, drop-outs, quorum, over-selection, resume."""

from __future__ import annotations

import math

import pytest

from federation import adapter_bytes, client_rows, rounds, small, untimed
from flexlora.errors import RunFailed, UserError
from flexlora.lora.ranks import RankClass
from flexlora.simulations.simulate import resume, simulate
from flexlora.simulations.world.clock import Effort
from flexlora.simulations.world.populations import Population
from flexlora.simulations.world.simulated_time import LOST_AFTER, NOMINAL_SECONDS, world_of

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


def test_who_leaves_early_has_only_a_part_of_what_it_was_sent():
    keys = {"population__devices": "h100-sxm:1.0", "population__links": "3g:1.0"}
    here = world(population__dropout=1.0, **keys)
    shares = {}
    for client_id in IDS:
        here.send(client_id, effort(client_id, bytes_down=10**6))
        link = here.population.client(client_id).link
        came = (here.spent(client_id).seconds - link.latency_seconds) * 1e6 * link.down_mbps / 8
        shares[client_id] = here.downloaded(client_id)
        assert shares[client_id] == pytest.approx(min(1.0, max(0.0, came / 10**6)))
    assert {0.0, 1.0} < set(shares.values()), "before the first byte, in the middle, after the last"
    stays = world(**keys)
    stays.send("m", effort("client_00"))
    assert stays.downloaded("client_00") == 1.0


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


def test_waiting_for_nodes_misses_nobody_while_a_reply_is_on_its_way():
    here = world(population__availability="markov", population__straggler_share=1.0)
    online = next(c for c in IDS if here.online(c))
    here.send("slow", effort(online))
    first = min(here.population.availability.changes_at(c, 0.0) for c in IDS)
    arrives = min(t.arrives for t in here._trips.values())
    for until in (first / 2, first, arrives, 10 * arrives):
        assert world_after(here, until) == min(until, first, arrives)


def world_after(here, until):
    """Where a wait for nodes from the beginning ends."""
    here.set(0.0)
    here.wait_for_nodes(until)
    return here.now()


def test_a_quorum_that_comes_together_while_a_late_reply_is_awaited_is_a_round(tmp_path):
    """client_01 can be reached from 160 to 300 s, client_00's reply of round 1 comes at 1,200 s."""
    lines = ["client_id,start_seconds,end_seconds", "client_00,0,5000", "client_01,0,50"]
    lines += ["client_01,160,300", "client_02,4000,5000", "client_03,4000,5000"]
    (tmp_path / "trace.csv").write_text("\n".join(lines))
    config = small(
        num_server_rounds=2,
        population__availability="trace",
        population__trace=str(tmp_path / "trace.csv"),
        population__straggler_share=1.0,
        population__straggler_slowdown=20.0,
        server__quorum=2,
        server__wait_seconds=300.0,
        server__round_timeout_seconds=100.0,
    )
    with pytest.raises(RunFailed, match="no client was trained in 2 rounds"):
        simulate(config, tmp_path / "run")
    first, second = rounds(tmp_path / "run")[1:]
    assert first["simulated_seconds"] == pytest.approx(100.0)
    asked = {row["client_id"] for row in client_rows(tmp_path / "run", 2)}
    assert asked == {"client_00", "client_01"} and "updates came" in second["skipped"]
    assert second["simulated_seconds"] == pytest.approx(160.0 - 100.0 + 100.0)


def test_a_client_does_one_thing_at_a_time():
    """Two trainings of 240 s, sent at 0 and at 90 s: the second ends at 480 s, not at 330 s."""
    slow = {"population__straggler_share": 1.0, "population__straggler_slowdown": 4.0}
    here, took = world(**slow), 4 * NOMINAL_SECONDS
    assert here.send("first", effort("client_00", 1))
    here.set(90.0)
    assert here.send("second", effort("client_00", 2))
    assert here.send("other", effort("client_01", 2))
    arrivals = {}
    while len(arrivals) < 3:
        here.wait(1e9)
        arrivals |= {
            name: here.now()
            for name in ("first", "second", "other")
            if name not in arrivals and here.arrived(name)
        }
    assert arrivals == {"first": took, "other": 90.0 + took, "second": 2 * took}
    assert here.spent("client_00").seconds == took, "waiting for its turn is not work"
    here.set(1000.0)
    assert here.send("idle again", effort("client_00", 3))
    here.wait(1e9)
    assert here.now() == 1000.0 + took


def test_a_client_whose_answer_is_given_up_is_busy_all_the_same():
    here = world(population__straggler_share=1.0, population__straggler_slowdown=4.0)
    here.send("first", effort("client_00", 1))
    here.forget("first")
    here.send("second", effort("client_00", 2))
    here.wait(1e9)
    assert here.now() == 8 * NOMINAL_SECONDS


def test_a_client_that_has_left_is_not_busy_any_more():
    here = world(population__dropout=1.0)
    here.send("first", effort("client_00", 1))
    here.send("second", effort("client_00", 2))
    parts = [here.population.leaves_at("client_00", at) * NOMINAL_SECONDS for at in (1, 2)]
    here.wait(1e9)
    assert here.now() == pytest.approx(parts[0] + LOST_AFTER)
    here.wait(1e9)
    assert here.now() == pytest.approx(sum(parts) + LOST_AFTER)


def test_who_goes_offline_does_not_begin_what_waits_for_its_turn():
    here = world(population__availability="markov", population__online_hours=0.04)
    ends = {c: here.population.availability.changes_at(c, 0.0) for c in IDS if here.online(c)}
    once = [c for c in ends if NOMINAL_SECONDS <= ends[c] < 2 * NOMINAL_SECONDS]
    assert once, "nobody stays for one training and not for two"
    for client_id in once:
        assert here.send(f"{client_id} 1", effort(client_id, 1))
        assert not here.send(f"{client_id} 2", effort(client_id, 2))
        assert here.spent(client_id).seconds == pytest.approx(ends[client_id] - NOMINAL_SECONDS)


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
    with pytest.raises(RunFailed, match=r"no update counted in 2 rounds .*: skipped: . update"):
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
    with pytest.raises(RunFailed, match=r"clients can be reached, server\.quorum is 4"):
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
