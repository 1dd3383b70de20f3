"""Rounds below the quorum do not count: others are held, until there are too many in a row."""

from __future__ import annotations

import pytest

from faulty_grid import SILENT, FaultyGrid, Told, lost, people, run, settings
from federation import StopAt, Stopped, federation, rounds, same_bytes, small
from flexlora.clients.messages import decode_train_job
from flexlora.errors import RunFailed, TooFewUpdates
from flexlora.report.records import read_run
from flexlora.simulations.simulate import simulate
from flexlora.training.schedule import TrainSettings, learning_rate_at

QUORUM = {"num_server_rounds": 3, "server__quorum": 2, "server__backoff_rounds": 0}


class Jobs(FaultyGrid):
    """Keeps the jobs that are sent, by round."""

    def push_messages(self, messages):
        for message in messages:
            if message.metadata.message_type == "train":
                job = decode_train_job(message.content, "anybody")
                self.__dict__.setdefault("jobs", {})[job.server_round] = job
        return super().push_messages(messages)


def held(failing, *, count=2, shown=None, rows=None, **changes):
    """A run of which the rounds ``failing`` lose client_1 for good."""
    fates = {(server_round, "client_1"): [lost(5)] * 9 for server_round in failing}
    grid = Jobs(people(count), fates)
    return grid, run(grid, settings(**(QUORUM | changes)), rows=rows, observer=shown)


def test_a_skipped_round_is_held_again_and_the_run_trains_as_often_as_asked():
    shown, rows = Told(), []
    _, strategy = held([2], shown=shown, rows=rows)
    assert strategy.state.round == 4 and strategy.ended == ""
    finished = [row for (row,) in shown.of("round_finished")]
    assert [row["round"] for row in finished] == [0, 1, 2, 3, 4]
    assert ["skipped" in row for row in finished] == [False, False, True, False, False]
    assert [row.get("held_again", False) for row in finished] == [n == 2 for n in range(5)]
    assert [args[:2] for args in shown.of("round_started")] == [
        *([0, 3], [1, 3], [2, 3], [3, 4], [4, 4])
    ]


def test_without_a_skipped_round_nothing_changes():
    _, strategy = held([])
    _, counting = held([], server__skipped_rounds=0)
    assert same_bytes(strategy.state, counting.state) and strategy.state.round == 3


def test_they_count_where_that_is_asked_for():
    shown = Told()
    _, strategy = held([2], shown=shown, server__skipped_rounds=0)
    assert strategy.state.round == 3 and strategy.ended == ""
    assert [args[1] for args in shown.of("round_started")] == [3] * 4


def test_the_learning_rate_follows_the_rounds_that_count():
    chosen = TrainSettings(lr_scheduler_type="linear", learning_rate=1.0)
    grid, _ = held([1, 3])
    rates = {n: learning_rate_at(chosen, job, 0, 1) for n, job in sorted(grid.jobs.items())}
    assert rates == pytest.approx({1: 1.0, 2: 1.0, 3: 2 / 3, 4: 2 / 3, 5: 1 / 3})


def test_after_too_many_in_a_row_the_run_ends_and_says_how_far_it_came():
    _, strategy = held(range(2, 99), server__skipped_rounds=4)
    assert strategy.state.round == 5
    assert "4 rounds in a row were skipped" in strategy.ended
    assert "after round 5, with 1 of 3 rounds that count" in strategy.ended
    _, strategy = held([2, 3, 4, 6, 7, 8], server__skipped_rounds=4)
    assert strategy.ended == "" and strategy.state.round == 9


def test_between_skipped_rounds_a_run_pauses_for_longer_and_longer():
    shown = Told()
    held([1, 2, 3], shown=shown, server__wait_seconds=50.0)
    pauses = [seconds for what, seconds in shown.of("waiting") if "skipped" in what]
    assert pauses == [15.0, 30.0, 50.0]


def test_a_federation_that_ends_so_fails_and_keeps_its_last_adapter(tmp_path):
    grid = FaultyGrid(people(3), {(n, "client_1"): [SILENT] * 9 for n in range(2, 9)})
    changes = {**QUORUM, "server__quorum": 3, "server__skipped_rounds": 2, "out": ""}
    with pytest.raises(
        TooFewUpdates, match=r"2 rounds in a row .* after round 3, with 1 of 3 rounds"
    ):
        federation(grid, settings(**changes), tmp_path / "run")
    assert (tmp_path / "run/adapters/global/adapter_model.safetensors").is_file()
    assert [row["round"] for row in rounds(tmp_path / "run")] == [0, 1, 2, 3]
    assert read_run(tmp_path / "run").num_rounds == 5 and not read_run(tmp_path / "run").finished


def test_a_resumed_run_knows_what_was_skipped(tmp_path):
    fates = {(2, "client_1"): [lost(5)] * 9}
    whole, broken = (FaultyGrid(people(2), dict(fates)) for _ in range(2))
    expected, _ = federation(whole, settings(**QUORUM), tmp_path / "whole")
    with pytest.raises(Stopped):
        stop = StopAt("round_finished", 3)
        federation(broken, settings(**QUORUM), tmp_path / "broken", observer=stop)
    again = Jobs(people(2))
    resumed, folder = federation(again, settings(**QUORUM), tmp_path / "broken", resume=True)
    assert same_bytes(resumed.state, expected.state) and resumed.state.round == 4
    assert (again.jobs[4].server_round, again.jobs[4].skipped_rounds) == (4, 1)
    assert read_run(folder.path).finished and read_run(folder.path).num_rounds == 4


def test_in_a_simulation_they_count(tmp_path):
    config = small(num_server_rounds=2, population__dropout=0.7, server__quorum=3)
    with pytest.raises(RunFailed, match="no update counted in 2 rounds"):
        simulate(config, tmp_path / "run")
    assert read_run(tmp_path / "run").num_rounds == 2 and read_run(tmp_path / "run").finished
