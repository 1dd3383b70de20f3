"""Workers that die of what they are given: who is tried again, where, how often, and who fails.

The pool is the real one with its threads; stand-ins take the place of Ray's processes, so that a
worker can die of a certain client. ``test_ray_pool.py`` kills real ones.
"""

from __future__ import annotations

import time
from contextlib import closing
from unittest.mock import MagicMock

import pytest

from flexlora.config.resolve import Config
from flexlora.simulations.engine import ray_pool
from flexlora.simulations.engine.ray_cohort import TRIES, TRIES_ALONE
from flexlora.simulations.engine.ray_pool import RayPool
from flexlora.simulations.engine.ray_start import Session
from flexlora.wire.jobs import EvalJob, EvalResult

PATIENCE = 300.0


class Rehearsal(RayPool):
    """Workers answer at once, or die: ``dies(client ids)`` says of which; ``births`` may come."""

    def __init__(self, dies, *, workers=1, births=1000):
        self.dies, self.births, self.log = dies, births, []
        super().__init__(Config(), workers=workers + 1, local=lambda: None)

    def train_here(self, wanted):
        """This process only waits."""
        with self.changed:
            wanted.wanted = True
            self.changed.notify_all()

    def _start_worker(self):
        with self.changed:
            self.births -= 1
            self.changed.wait_for(lambda: self.births >= 0 or self.ended is not None)
        return MagicMock()

    def _ask(self, actor, cohort):
        clients = [job.client_id for job in cohort.remaining]
        self.log.append(clients)
        if self.dies(clients):
            raise ray_pool.WorkerDied("killed by SIGKILL")
        return [EvalResult(client_id=client) for client in clients]

    def _kill(self, actor):
        """It is no process."""


@pytest.fixture
def rehearsal(monkeypatch):
    monkeypatch.setattr(ray_pool.ray_start, "import_ray", lambda **_: None)
    monkeypatch.setattr(ray_pool.ray_start, "start", lambda _: Session(connected=False))
    monkeypatch.setattr(ray_pool.ray_start, "placement", lambda *_, **__: {})
    monkeypatch.setattr(ray_pool, "_call", lambda *_, **__: None)
    return lambda *args, **options: closing(Rehearsal(*args, **options))


def cohort_of(pool, clients):
    return pool.evaluate([EvalJob(client_id=c, server_round=1, adapters={}) for c in clients])


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "this never came to be"
        time.sleep(0.01)


def outcome(cohort):
    """Client by client whether it has a result; waits no longer than a test may."""
    cohort.pool.train_here(cohort)
    results = cohort.answer.result(PATIENCE)
    return {result.client_id: not result.cause for result in results}, results


@pytest.mark.parametrize("workers", [1, 2])
def test_only_the_client_that_kills_a_worker_by_itself_fails(rehearsal, workers):
    with rehearsal(lambda clients: "c2" in clients, workers=workers) as pool:
        poisoned = cohort_of(pool, ["c0", "c1", "c2", "c3"])
        others = [cohort_of(pool, [f"d{k}", f"e{k}"]) for k in range(3)]
        done, results = outcome(poisoned)
        assert list(done.items()) == [("c0", True), ("c1", True), ("c2", False), ("c3", True)]
        assert f"died {TRIES_ALONE} times with this client alone in it" in results[2].cause
        assert "killed by SIGKILL" in results[2].cause
        assert all(all(outcome(other)[0].values()) for other in others)
        tried = [clients for clients in pool.log if "c2" in clients]
        assert tried == [["c0", "c1", "c2", "c3"]] * TRIES + [["c2"]] * TRIES_ALONE
        assert not pool.in_work and not pool.queue


def test_clients_that_are_too_many_for_one_pass_are_trained_by_themselves(rehearsal):
    with rehearsal(lambda clients: len(clients) > 2) as pool:
        done, _ = outcome(cohort_of(pool, ["c0", "c1", "c2"]))
        assert done == dict.fromkeys(("c0", "c1", "c2"), True)
        assert pool.log == [["c0", "c1", "c2"]] * TRIES + [["c0"], ["c1"], ["c2"]]


def test_where_every_worker_dies_everybody_fails_and_nobody_waits(rehearsal):
    with rehearsal(lambda _: True) as pool:
        cohorts = [cohort_of(pool, [f"{name}{k}" for k in range(5)]) for name in "ab"]
        done = [outcome(cohort)[0] for cohort in cohorts]
        assert not any(any(each.values()) for each in done)
        assert len(pool.log) == 2 * (TRIES + 5 * TRIES_ALONE), "bounded, and none too few"


def test_a_client_that_was_alone_from_the_start_has_its_tries(rehearsal):
    with rehearsal(lambda _: True) as pool:
        _, (result,) = outcome(cohort_of(pool, ["c0"]))
        assert f"died {TRIES} times with this client alone" in result.cause
        assert pool.log == [["c0"]] * TRIES


def test_this_process_takes_no_cohort_that_has_killed_a_worker(rehearsal):
    """The one worker dies of it and its successor never comes: it waits, the others are taken."""
    with rehearsal(lambda clients: "c0" in clients, births=1) as pool:
        poisoned = cohort_of(pool, ["c0", "c1"])
        harmless = cohort_of(pool, ["d0"])
        wait_until(lambda: poisoned.deaths and poisoned in pool.queue)
        assert list(pool.queue) == [poisoned, harmless], "a worker has it first"
        assert pool.claim(poisoned) is harmless
        assert pool.claim(poisoned) is None and pool.claim(harmless) is None
        assert list(pool.queue) == [poisoned]


def test_this_process_takes_no_client_of_such_a_cohort_either(rehearsal):
    with rehearsal(lambda clients: len(clients) > 1, births=TRIES) as pool:
        poisoned = cohort_of(pool, ["c0", "c1"])
        wait_until(lambda: poisoned.deaths == TRIES and poisoned in pool.queue)
        assert len(poisoned.remaining) == 1
        assert pool.claim(poisoned) is None
        pool.close()
        with pytest.raises(RuntimeError, match="the pool is closed"):
            poisoned.answer.result(PATIENCE)


def test_an_accident_costs_nobody_anything(rehearsal):
    deaths = iter([True])
    with rehearsal(lambda _: next(deaths, False)) as pool:
        done, _ = outcome(cohort_of(pool, ["c0", "c1"]))
        assert done == {"c0": True, "c1": True}
        assert pool.log == [["c0", "c1"]] * 2
