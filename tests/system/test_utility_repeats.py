"""Utility sampling: what this machine happens to take for a training decides nothing.

Seconds of a training count where they are a client's own (a deployment), or simulated.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from faulty_grid import FaultyGrid, people, run, settings
from federation import adapter_bytes, client_rows, small
from flexlora.clients.worker import Worker
from flexlora.seeds import derive_seed
from flexlora.simulations.simulate import simulate
from flexlora.simulations.world.simulated_time import NOMINAL_SECONDS

UTILITY = {"clients__count": 8, "sampling__policy": "utility", "eval__every": 0}
SHORT = {"train__max_steps": 1, "lora__target_modules": "q_proj"}


def disturbed(monkeypatch, salt):
    """Trainings take what a busy machine makes of them: from 1 to 1,000 s by client and round."""
    honest = Worker.train

    def train(self, jobs):
        took = [1 + derive_seed(salt, job.client_id, job.server_round) % 1000 for job in jobs]
        results = honest(self, jobs)
        return [
            replace(result, train_seconds=float(own))
            for result, own in zip(results, took, strict=True)
        ]

    monkeypatch.setattr(Worker, "train", train)


@pytest.mark.parametrize("world", [{}, {"population__dropout": 1e-9}], ids=["no clock", "a clock"])
def test_a_run_repeats_however_busy_the_machine_was(world, tmp_path):
    config = small(num_server_rounds=5, fraction_train=0.5, **UTILITY, **SHORT, **world)
    for salt in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            disturbed(patch, salt)
            simulate(config, tmp_path / str(salt))
    first, second = tmp_path / "1", tmp_path / "2"
    seconds = [[row["seconds"] for row in client_rows(path)] for path in (first, second)]
    assert seconds[0] != seconds[1], "nothing was disturbed"
    asked = [
        [(row["round"], row["client_id"]) for row in client_rows(path)] for path in (first, second)
    ]
    assert asked[0] == asked[1]
    assert adapter_bytes(first) == adapter_bytes(second)


def test_in_a_deployment_they_are_the_clients_own():
    strategy = run(FaultyGrid(people(3)), settings(sampling__policy="utility"))
    assert strategy.metrics.measured


def test_a_late_update_is_remembered_with_what_it_took_out_there(tmp_path):
    config = small(
        num_server_rounds=3,
        population__straggler_share=0.4,
        population__straggler_slowdown=2.0,
        server__round_timeout_seconds=1.5 * NOMINAL_SECONDS,
        **UTILITY,
        **SHORT,
    )
    strategy = simulate(config, tmp_path / "run")
    late = [row for row in client_rows(tmp_path / "run") if row["cause"].startswith("late")]
    assert late
    assert {float(row["simulated_seconds"]) for row in late} == {2 * NOMINAL_SECONDS}
    assert {row["joules"] for row in late} == {""}, "counted in the round that sent them"
    learned = {took for _, _, took in strategy.selector.history.last.values()}
    assert learned == {NOMINAL_SECONDS, 2 * NOMINAL_SECONDS}
