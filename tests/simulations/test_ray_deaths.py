"""Workers that die of what they are given: who is tried again, where, how often, and who fails.

The dispatcher is the real one with its thread; stand-ins take the place of Ray's processes, so
that a worker can die of a certain client. ``test_ray_pool.py`` kills real ones.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from contextlib import closing
from types import SimpleNamespace

import pytest

from flexlora.config.resolve import Config
from flexlora.simulations.engine import ray_dispatch
from flexlora.simulations.engine.ray_dispatch import TRIES, TRIES_ALONE, Dispatcher
from flexlora.simulations.engine.ray_pool import Cohort
from flexlora.simulations.engine.ray_start import Need, Session
from flexlora.wire.jobs import EvalJob, EvalResult

PATIENCE = 60.0


class Actor:
    """Answers at once, or dies: ``dies(client ids)`` says of which."""

    def __init__(self, dies, log):
        self.evaluate = SimpleNamespace(remote=self.work)
        self.placed = SimpleNamespace(remote=lambda: self.answer("here"))
        self.dies, self.log = dies, log

    def work(self, jobs, keys, *references):
        clients = [job.client_id for job in jobs]
        self.log.append(clients)
        dead = RuntimeError("killed by SIGKILL") if self.dies(clients) else None
        return self.answer([EvalResult(client_id=c) for c in clients], dead)

    def answer(self, value, error=None):
        future = Future()
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)
        return SimpleNamespace(future=lambda: future)


class Rehearsal(Dispatcher):
    """``dies`` as in ``Actor``; ``births`` workers may come, the first ones included."""

    def __init__(self, dies, *, workers=1, births=1000):
        self.dies, self.births, self.log = dies, births, []
        need = Need(loaded_bytes=0, training_bytes=0)
        super().__init__(Config(), workers, "", need, here=1)

    def _spawn(self, lost=0):
        self.births -= 1
        actor = Actor(self.dies, self.log)
        self.actors.add(actor)
        self.placed[actor] = self.births
        if self.births >= 0:
            self.idle.append(actor)
            self.events.put(self._deal)

    def _kill(self, actor):
        """It is no process."""


@pytest.fixture
def rehearsal(monkeypatch):
    monkeypatch.setattr(ray_dispatch.ray_start, "start", lambda _: Session(connected=False))
    monkeypatch.setattr(ray_dispatch.ray_start, "placement", lambda *_, **__: {})
    monkeypatch.setattr(ray_dispatch, "_check_connected", lambda: None)
    return lambda *args, **options: closing(Rehearsal(*args, **options))


def cohort_of(dispatcher, clients, local=None):
    jobs = [EvalJob(client_id=c, server_round=1, adapters={}) for c in clients]
    cohort = Cohort("evaluate", jobs, dispatcher, local)
    dispatcher.submit(cohort)
    return cohort


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "this never came to be"
        time.sleep(0.01)


def outcome(cohort):
    """Client by client whether it has a result; waits no longer than a test may."""
    cohort.dispatcher.want(cohort)
    cohort.answer.result(PATIENCE)
    results = cohort.result()
    return {result.client_id: not result.cause for result in results}, results


@pytest.mark.parametrize("workers", [1, 2])
def test_only_the_client_that_kills_a_worker_by_itself_fails(rehearsal, workers):
    with rehearsal(lambda clients: "c2" in clients, workers=workers) as dispatcher:
        poisoned = cohort_of(dispatcher, ["c0", "c1", "c2", "c3"])
        others = [cohort_of(dispatcher, [f"d{k}", f"e{k}"]) for k in range(3)]
        done, results = outcome(poisoned)
        assert list(done.items()) == [("c0", True), ("c1", True), ("c2", False), ("c3", True)]
        assert f"died {TRIES_ALONE} times with this client alone in it" in results[2].cause
        assert "killed by SIGKILL" in results[2].cause
        assert all(all(outcome(other)[0].values()) for other in others)
        tried = [clients for clients in dispatcher.log if "c2" in clients]
        assert tried == [["c0", "c1", "c2", "c3"]] * TRIES + [["c2"]] * TRIES_ALONE
        assert not dispatcher.unsettled and not dispatcher.queue


def test_clients_that_are_too_many_for_one_pass_are_trained_by_themselves(rehearsal):
    with rehearsal(lambda clients: len(clients) > 2) as dispatcher:
        done, _ = outcome(cohort_of(dispatcher, ["c0", "c1", "c2"]))
        assert done == dict.fromkeys(("c0", "c1", "c2"), True)
        assert dispatcher.log == [["c0", "c1", "c2"]] * TRIES + [["c0"], ["c1"], ["c2"]]


def test_where_every_worker_dies_everybody_fails_and_nobody_waits(rehearsal):
    with rehearsal(lambda _: True) as dispatcher:
        cohorts = [cohort_of(dispatcher, [f"{name}{k}" for k in range(5)]) for name in "ab"]
        done = [outcome(cohort)[0] for cohort in cohorts]
        assert not any(any(each.values()) for each in done)
        assert len(dispatcher.log) == 2 * (TRIES + 5 * TRIES_ALONE), "bounded, and none too few"


def test_a_client_that_was_alone_from_the_start_has_its_tries(rehearsal):
    with rehearsal(lambda _: True) as dispatcher:
        _, (result,) = outcome(cohort_of(dispatcher, ["c0"]))
        assert f"died {TRIES} times with this client alone" in result.cause
        assert dispatcher.log == [["c0"]] * TRIES


def test_this_process_takes_no_cohort_that_has_killed_a_worker(rehearsal):
    """The one worker dies of it and its successor never comes: it waits, the others are taken."""
    with rehearsal(lambda clients: "c0" in clients, births=1) as dispatcher:
        poisoned = cohort_of(dispatcher, ["c0", "c1"])
        harmless = cohort_of(dispatcher, ["d0"])
        wait_until(lambda: poisoned.suspect and poisoned in dispatcher.queue)
        assert list(dispatcher.queue) == [poisoned, harmless], "a worker has it first"
        assert dispatcher.claim(poisoned) is harmless
        assert dispatcher.claim(poisoned) is None and dispatcher.claim(harmless) is None
        assert list(dispatcher.queue) == [poisoned]


def test_this_process_takes_no_part_of_such_a_cohort_either(rehearsal):
    with rehearsal(lambda clients: len(clients) > 1, births=TRIES) as dispatcher:
        poisoned = cohort_of(dispatcher, ["c0", "c1"])
        wait_until(lambda: len(dispatcher.queue) == 2)
        assert [len(part.jobs) for part in dispatcher.queue] == [1, 1]
        assert dispatcher.claim(poisoned) is None
        dispatcher.close()
        with pytest.raises(RuntimeError, match="the pool is closed"):
            poisoned.answer.result(PATIENCE)


def test_an_accident_costs_nobody_anything(rehearsal):
    deaths = iter([True])
    with rehearsal(lambda _: next(deaths, False)) as dispatcher:
        done, _ = outcome(cohort_of(dispatcher, ["c0", "c1"]))
        assert done == {"c0": True, "c1": True}
        assert dispatcher.log == [["c0", "c1"]] * 2
