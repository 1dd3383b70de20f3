"""Which clients share a pass: everybody once, alike together, within the limits; and tuning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builders import random_adapter, train_job
from federation import small
from flexlora.clients.worker import worker_for
from flexlora.config.resolve import Config, resolved
from flexlora.data.collation import Example
from flexlora.errors import UserError
from flexlora.simulations.engine.cohorts import (
    CohortLimits,
    limits_of,
    plan_cohorts,
    resolved_limits,
)
from flexlora.simulations.tune import Measured, fastest, first_round, measured, tune

SHAPES = {"q": (8, 8)}


def row(length):
    return Example(input_ids=(1,) * length, prompt_length=1, prompt="", answer="")


def jobs_of(clients):
    return {
        f"m{i}": train_job(random_adapter(SHAPES, rank), f"c{i:02d}")
        for i, (rank, _) in enumerate(clients)
    }


def planned(clients, limits, **options):
    jobs = jobs_of(clients)
    rows = {f"c{i:02d}": [row(3), row(length)] for i, (_, length) in enumerate(clients)}
    plan = plan_cohorts(jobs, limits, rows=rows.__getitem__, batch_size=2, **options)
    return jobs, plan


some_clients = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(2, 200)), min_size=1, max_size=20
)


@settings(max_examples=60, deadline=None)
@example(clients=[(1, 2)] * 5 + [(1, 5)], most=4, tokens=24)
@given(clients=some_clients, most=st.integers(1, 8), tokens=st.integers(10, 1000))
def test_everybody_once_and_within_the_limits(clients, most, tokens):
    jobs, plan = planned(clients, CohortLimits(clients=most, tokens=tokens))
    assert sorted(key for cohort in plan for key in cohort) == sorted(jobs)
    for cohort in plan:
        widest = max(clients[int(key[1:])][1] for key in cohort)
        assert len(cohort) <= most
        assert len(cohort) == 1 or len(cohort) * 2 * max(widest, 3) <= tokens


def test_the_plan_does_not_depend_on_the_order_in_which_jobs_come():
    clients = [(1 + i % 3, 20 + 13 * i % 90) for i in range(12)]
    jobs, plan = planned(clients, CohortLimits(clients=4))
    rows = {f"c{i:02d}": [row(3), row(length)] for i, (_, length) in enumerate(clients)}
    turned = dict(reversed(jobs.items()))
    limits = CohortLimits(clients=4)
    assert plan_cohorts(turned, limits, rows=rows.__getitem__, batch_size=2) == plan


def test_alike_lengths_are_together_and_then_alike_ranks():
    clients = [(8, 20), (1, 200), (8, 200), (1, 20), (1, 21), (8, 196), (8, 25), (1, 195)]
    _, plan = planned(clients, CohortLimits(clients=2))
    assert plan == [["m3", "m4"], ["m0", "m6"], ["m1", "m7"], ["m2", "m5"]]


def test_another_base_is_another_pass():
    clients = [(2, 20)] * 6
    key = {f"c{i:02d}": str(i % 2) for i in range(6)}.__getitem__
    _, plan = planned(clients, CohortLimits(clients=6), pass_key=key)
    assert plan == [["m0", "m2", "m4"], ["m1", "m3", "m5"]]


def test_the_resolved_configuration_names_the_plan_and_keeps_what_was_given():
    worker = worker_for(resolved(small()))
    config = resolved_limits(resolved(small()), worker)
    limits = limits_of(config)
    assert limits.clients > 1 and limits.tokens >= config.train.max_length
    assert limits_of(resolved_limits(config, worker)) == limits
    given = small(engine__cohort_size=3)
    chosen = limits_of(resolved_limits(given, worker))
    assert chosen.clients == 3
    assert chosen.tokens >= 3 * given.train.max_length * 2, "three clients fit, whatever"
    both = small(engine__cohort_size=3, engine__cohort_tokens=100)
    assert limits_of(resolved_limits(both, worker)) == CohortLimits(clients=3, tokens=100)


def test_little_memory_makes_small_passes():
    worker = worker_for(resolved(small()))
    whole = limits_of(resolved_limits(small(), worker)).tokens
    before = worker.free_bytes
    try:
        worker.free_bytes = 40 << 20
        little = limits_of(resolved_limits(small(), worker)).tokens
    finally:
        worker.free_bytes = before
    assert small().train.max_length <= little < whole


def test_tuning_measures_real_cohorts_and_takes_the_smallest_of_the_fastest(tmp_path, capsys):
    config = resolved(small())
    worker = worker_for(config)
    ranks = [job.start.rank_class.rank for job in first_round(config, worker)]
    assert ranks == sorted(ranks, reverse=True) and len(ranks) == 4
    sizes = list(measured(config, worker))
    assert [size.clients for size in sizes] == [1, 2, 4][: len(sizes)]
    assert all(size.steps_per_second > 0 for size in sizes)
    rates = [Measured(clients=k, steps_per_second=v) for k, v in ((1, 5), (2, 9.8), (4, 10))]
    assert fastest(rates).clients == 2
    assert tune(small(), out=str(tmp_path / "tuned.toml")) == 0
    written = Config.resolve(file=tmp_path / "tuned.toml")
    assert written.engine.cohort_size in (1, 2, 4) and "chosen" in capsys.readouterr().out
    assert {k: v for k, v in written.flat().items() if "cohort" not in k} == {
        k: v for k, v in small().flat().items() if "cohort" not in k
    }
    with pytest.raises(UserError, match="already exists"):
        tune(small(), out=str(tmp_path / "tuned.toml"))


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    import flexlora.simulations.tune as module

    monkeypatch.setattr(module, "measured", lambda *_: pytest.fail("measured first"))
    with pytest.raises(UserError, match="cannot be written: No such file"):
        tune(small(), out=str(tmp_path / "nowhere" / "tuned.toml"))
    assert not list(tmp_path.iterdir())


def test_tuning_stops_at_the_memory_and_says_so_where_nothing_fits(monkeypatch):
    import flexlora.simulations.tune as module

    config = resolved(small())

    def train(slots, jobs, *rest, **options):
        if len(jobs) > 1:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(module, "train", train)
    assert [size.clients for size in measured(config, worker_for(config))] == [1]
    with pytest.raises(UserError, match="one client alone runs out of memory"):
        fastest([])
