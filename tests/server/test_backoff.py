"""Nodes that lose messages sit out for a while, and a run never stands still for it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faulty_grid import SILENT, Fate, FaultyGrid, lost, people, run, settings
from flexlora.server.members.sampling import History, Reachable
from flexlora.server.members.selection import split_backing_off

DEAD = [lost(8, 0.0)] * 9


def crowd(*client_ids):
    return [Reachable(client_id=c, num_examples=1, rank_class="rank_2") for c in client_ids]


def rounds_out(losses, most_rounds, last=10):
    """For how many rounds a client sits out after so many losses in a row."""
    lost_by, options = {"c": (losses, last)}, {"least": 0, "most_rounds": most_rounds}
    later = range(last + 1, last + 40)
    out = [t for t in later if split_backing_off(crowd("c"), lost_by, t, **options)[1]]
    assert out == list(range(last + 1, last + 1 + len(out))), "one stretch, from the next round on"
    return len(out)


def test_one_two_four_rounds_up_to_the_most():
    assert [rounds_out(k, 8) for k in range(1, 7)] == [1, 2, 4, 8, 8, 8]
    assert [rounds_out(k, 3) for k in range(1, 5)] == [1, 2, 3, 3]
    assert [rounds_out(k, 1) for k in (1, 2, 500)] == [1, 1, 1]
    assert rounds_out(3, 0) == 0 and rounds_out(500, 8) == 8


def test_any_reply_begins_anew_and_the_checkpoint_keeps_it():
    history = History()
    history.lose("a", 1)
    history.lose("a", 3)
    history.lose("b", 3)
    again = History.from_dict(history.to_dict())
    assert again.lost == {"a": (2, 3), "b": (1, 3)}
    again.hear("a")
    again.lose("a", 4)
    assert again.lost == {"a": (1, 4), "b": (1, 3)}
    old = {"rounds": 0, "seen": {}, "last": {}}  # of a checkpoint from before there was any
    assert History.from_dict(old).lost == {}


def test_those_who_have_waited_longest_are_asked_where_too_few_are_left():
    losses = {"a": (3, 9), "b": (3, 7), "c": (3, 8)}
    able, out = split_backing_off(crowd("a", "b", "c", "d"), losses, 10, least=3, most_rounds=8)
    assert [client.client_id for client in able] == ["b", "c", "d"]
    assert out == {"a": "sits out to round 13: lost 3 times in a row, last in round 9"}


@given(
    losses=st.dictionaries(
        st.sampled_from("abcdef"), st.tuples(st.integers(1, 9), st.integers(1, 20))
    ),
    least=st.integers(0, 8),
    most_rounds=st.integers(0, 8),
)
def test_nobody_is_lost_and_a_round_is_never_made_impossible(losses, least, most_rounds):
    everybody = crowd(*"abcdef")
    able, out = split_backing_off(everybody, losses, 21, least=least, most_rounds=most_rounds)
    assert sorted([c.client_id for c in able] + list(out)) == list("abcdef")
    assert len(able) >= min(least, 6)
    if most_rounds == 0:
        assert not out


CONFIG = {"fraction_train": 0.5, "num_server_rounds": 9, "server__wait_seconds": 5.0}


def asked_in(grid, client_id):
    return sorted({sent[1] for sent in grid.pushed if sent[0] == "train" and sent[2] == client_id})


def dead_client(rounds=range(1, 10), fate=DEAD):
    return {(server_round, "client_1"): fate for server_round in rounds}


def test_a_node_that_crashes_every_time_is_asked_less_and_less_and_its_row_says_why(caplog):
    rows = []
    grid = FaultyGrid(people(6), dead_client())
    run(grid, settings(**CONFIG, server__over_selection=1.0), rows=rows)
    assert asked_in(grid, "client_1") == [1, 3, 6]  # out for 1, 2, 4 rounds
    mine = {row["round"]: row for row in rows if row["client_id"] == "client_1"}
    assert [t for t in mine if mine[t]["status"] == "backing off"] == [2, 4, 5, 7, 8, 9]
    assert mine[7]["cause"] == "sits out to round 10: lost 3 times in a row, last in round 6"
    assert f"client client_1, round 7: {mine[7]['cause']}" in caplog.messages
    assert mine[6]["cause"] == "3 updates came first; code 8, not sent again"
    assert mine[7]["metrics"]["backing_off"] == 1 and mine[7]["metrics"]["clients_failed"] == 0


def test_without_back_off_it_is_asked_in_every_round():
    grid = FaultyGrid(people(6), dead_client())
    run(grid, settings(**CONFIG, server__over_selection=1.0, server__backoff_rounds=0))
    assert asked_in(grid, "client_1") == list(range(1, 10))


def test_a_reply_ends_it():
    grid = FaultyGrid(people(6), dead_client(rounds=[1, 3]))
    run(grid, settings(**CONFIG, server__over_selection=1.0))
    assert asked_in(grid, "client_1") == [1, 3, 6, 7, 8, 9]


@pytest.mark.parametrize("fate", [[lost(2)] * 9, [Fate(seconds=1.0)]])
def test_who_answers_is_never_out_whatever_the_answer(fate):
    """Code 2: the client's own code raised. It is there, and says so."""
    grid = FaultyGrid(people(6), dead_client(fate=fate))
    run(grid, settings(**CONFIG, server__over_selection=1.0))
    assert asked_in(grid, "client_1") == list(range(1, 10))


def test_silence_is_a_loss_where_the_round_waited_for_it_and_a_late_answer_ends_it():
    quiet = [SILENT] * 9
    late = [Fate(seconds=100.5), SILENT, SILENT]
    for mine, lost_by in ((quiet, {"client_1", "client_2"}), (late, {"client_2"})):
        fates = {(1, "client_0"): quiet, (1, "client_1"): mine, (1, "client_2"): quiet}
        grid, rows = FaultyGrid(people(4), fates), []
        changes = {**CONFIG, "num_server_rounds": 2, "server__over_selection": 1.0}
        strategy = run(grid, settings(**changes), rows=rows)
        out = [(r["round"], r["client_id"]) for r in rows if r["status"] == "backing off"]
        assert out == [(2, "client_1"), (2, "client_2")], "client_0 is needed for the two wanted"
        assert set(strategy.selector.history.lost) == lost_by


def test_whoever_was_not_needed_has_lost_nothing():
    changes = {"fraction_train": 0.5, "num_server_rounds": 3, "server__over_selection": 1.0}
    slow = {(t, "client_1"): [Fate(seconds=30.0)] for t in (1, 2, 3)}
    grid, rows = FaultyGrid(people(4), slow), []
    run(grid, settings(**changes), rows=rows)
    mine = [row["status"] for row in rows if row["client_id"] == "client_1"]
    assert mine == ["not needed"] * 3 and asked_in(grid, "client_1") == [1, 2, 3]


def test_where_everybody_is_wanted_everybody_is_asked():
    everybody = {(t, f"client_{k}"): DEAD for t in (1, 2) for k in range(3)}
    grid, rows = FaultyGrid(people(3), everybody), []
    strategy = run(grid, settings(num_server_rounds=3, fraction_train=1.0), rows=rows)
    assert [row["status"] for row in rows if row["round"] == 3] == ["ok"] * 3
    assert strategy.selector.history.lost == {}


def test_a_resumed_run_leaves_out_the_same_clients():
    """The notes of the checkpoint carry it over: no round differs from the run that went on."""
    config = settings(**CONFIG, server__over_selection=1.0)
    whole = FaultyGrid(people(6), dead_client())
    run(whole, config)
    first = FaultyGrid(people(6), dead_client())
    begun = run(first, settings(**CONFIG | {"num_server_rounds": 4}, server__over_selection=1.0))
    second = FaultyGrid(people(6, first_node=50), dead_client())
    state, history = begun.closed, begun.selector.history.to_dict()
    classes = {k: m.rank_class for k, m in begun.roster.members.items()}
    fresh = type(begun)(config, state=state, rank_classes=classes)
    fresh.restore({"history": history}, second)
    fresh.start(second)
    asked = [asked_in(grid, "client_1") for grid in (first, second)]
    assert asked[0] + asked[1] == asked_in(whole, "client_1") == [1, 3, 6]
    later = [sent[:3] for sent in whole.pushed if sent[0] == "train" and sent[1] > 4]
    assert [sent[:3] for sent in second.pushed if sent[0] == "train"] == later


def test_a_node_that_is_gone_for_good_is_not_among_those_that_can_be_asked():
    grid, rows = FaultyGrid(people(4), away={11: [(5.0, math.inf)]}), []
    slow = {(1, "client_0"): [Fate(seconds=10.0)]}
    grid.fates |= slow
    run(grid, settings(num_server_rounds=3), rows=rows)
    assert asked_in(grid, "client_1") == [1] and rows[-1]["metrics"]["clients_ok"] == 3
