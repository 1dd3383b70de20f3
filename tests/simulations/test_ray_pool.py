"""Cohorts over several processes: the same bytes, deaths survived, nothing left behind.

Ray is started once, by the pool that most tests share; further pools of this process use it too.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch

from builders import random_adapter, train_job
from federation import small, untimed
from flexlora.clients.worker import Worker
from flexlora.config.resolve import resolved
from flexlora.errors import UserError
from flexlora.simulations.engine.pool import LocalPool, make_pool
from flexlora.simulations.engine.ray_cohort import TRIES, TRIES_ALONE
from flexlora.simulations.engine.ray_pool import RayPool
from flexlora.simulations.engine.ray_start import import_ray
from flexlora.wire.jobs import EvalJob

pytestmark = pytest.mark.slow

CONFIG = resolved(small(clients__count=8, engine__workers=2, train__max_steps=10))
WORKER_CONFIG = CONFIG
LONG = CONFIG.with_values({"train.max-steps": 150})  # seconds: time to be killed in
PATIENCE = 300.0


@pytest.fixture(scope="module")
def pools():
    """The shared pool, and those that came after it was closed: tests may come in any order."""
    made = []
    yield made
    for pool in made:
        pool.close()


@pytest.fixture
def pool(pools):
    if not pools or pools[-1].ended is not None:
        pools.append(RayPool(CONFIG, workers=2))
    return pools[-1]


@pytest.fixture(scope="module")
def cohorts(worker):
    """Four cohorts of two clients at ranks 2 and 4 that all carry the same factors."""
    shapes = worker.slots.shapes
    starts = [random_adapter(shapes, rank, seed=rank, dtype=torch.float32) for rank in (2, 4)]
    carried = random_adapter(shapes, 8, seed=9, dtype=torch.float32)
    clients = enumerate(worker.client_ids)
    jobs = [train_job(starts[k % 2], client, carried=carried) for k, client in clients]
    return [jobs[at : at + 2] for at in range(0, 8, 2)]


def plain(results):
    """Every number of the results and a digest of every byte, without what a clock has measured."""
    rows = []
    for result in results:
        assert result.adapter is not None and result.cause == result.note == ""
        rows.append(untimed({**vars(result), "adapter": result.adapter.digest()}))
    return rows


def ray_processes():
    """Those that descend from this process and are Ray's, by what they are called."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline() or [""]
        except psutil.ZombieProcess:
            found.append((process, "zombie"))
            continue
        except psutil.NoSuchProcess:
            continue
        ours = any("flexlora-ray" in word for word in words)  # Ray's folder, named at the start
        if ours or words[0].startswith("ray::"):
            found.append((process, words[0]))
    return found


def processes(pool, doing="anything"):
    """The numbers of a pool's worker processes as reported: those that load, train, idle."""
    while True:
        with suppress(RuntimeError):  # it has changed while it was read
            found = [tuple(process) for process in pool.processes.values()]
            break
    return [pid for pid, now in found if pid is not None and doing in ("anything", now)]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"this never came to be; {ray_processes()}"
        time.sleep(0.05)


class Killer(threading.Thread):
    """Kills a pool's workers in the middle of what they are doing, ``times`` times, in a block."""

    def __init__(self, pool, times, doing="train"):
        super().__init__(daemon=True)
        self.pool, self.times, self.doing, self.killed = pool, times, doing, []

    def run(self):
        while len(self.killed) < self.times:
            for number in set(processes(self.pool, self.doing)) - set(self.killed):
                time.sleep(0.05)  # well into the work
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
                self.killed.append(number)
                break
            time.sleep(0.01)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.times = 0
        self.join(PATIENCE)


def test_one_worker_two_workers_and_no_ray_give_the_same_bytes(pool, worker, cohorts):
    local = LocalPool(worker)
    wanted = [plain(local.train(jobs).result()) for jobs in cohorts]
    assert len({row["adapter"] for rows in wanted for row in rows}) == 8, "each learned its own"
    pending = [pool.train(jobs) for jobs in cohorts]
    assert [plain(cohort.result()) for cohort in pending[::-1]][::-1] == wanted
    assert pending[0].result() is pending[0].result()
    with closing(RayPool(CONFIG, workers=1)) as alone:
        assert [plain(alone.train(jobs).result()) for jobs in cohorts] == wanted
    assert plain(pool.train(cohorts[0]).result()) == wanted[0], "closing one took the other's Ray"


def test_evaluation_is_the_same_too(pool, worker, cohorts):
    adapters = {"rank_2": cohorts[0][0].start.trained, "rank_4": cohorts[0][1].start.trained}
    jobs = [EvalJob(client_id=c, server_round=1, adapters=adapters) for c in worker.client_ids]
    wanted = [asdict(result) for result in worker.evaluate(jobs)]
    assert {result["cause"] for result in wanted} == {""}
    assert [asdict(result) for result in pool.evaluate(jobs).result()] == wanted
    assert wanted[0]["scores"]["rank_2"] != wanted[0]["scores"]["rank_4"]


def test_this_process_is_a_worker_too_and_from_the_start(pool, worker, cohorts):
    wanted = [plain(worker.train(jobs)) for jobs in cohorts]
    pool.train(cohorts[0]).result()  # Ray is there
    with closing(make_pool(CONFIG, worker)) as mixed:
        pending = [mixed.train(jobs) for jobs in cohorts]
        assert plain(pending[0].result()) == wanted[0] and mixed.loaded is None
        assert [plain(cohort.result()) for cohort in pending] == wanted
        wait_until(lambda: mixed.loaded is not None)
        assert len(processes(mixed)) == 1 and os.getpid() not in processes(mixed)
        pending = [mixed.train(jobs) for jobs in cohorts]
        assert [plain(cohort.result()) for cohort in pending[::-1]][::-1] == wanted


def test_what_this_process_raises_is_the_cause_of_its_cohort_alone(pool, worker, cohorts):
    pool.train(cohorts[0]).result()
    with closing(make_pool(CONFIG, worker)) as mixed:
        stranger = mixed.train([train_job(cohorts[0][0].start.trained, "nobody")])
        assert plain(mixed.train(cohorts[0]).result())
        failed = stranger.result()[0]
    assert failed.client_id == "nobody" and "nobody" in failed.cause and failed.adapter is None


def test_a_pool_that_ends_while_this_process_trains_says_why(pool, worker, cohorts):
    pool.train(cohorts[0]).result()

    def late():
        wait_until(lambda: crowd.ended is not None)
        return worker

    refused = pytest.raises(UserError, match=r"is 500, but the Ray cluster has room for 3: .*CPUs")
    with closing(RayPool(CONFIG, workers=500, local=late)) as crowd, refused:
        crowd.train(cohorts[0]).result()


def test_what_cohorts_share_crosses_once(pool, worker, cohorts, monkeypatch):
    ray, sent = import_ray(workers=2, address=""), []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: sent.append(value) or put(value))
    new = [random_adapter(worker.slots.shapes, 2, seed=s, dtype=torch.float32) for s in (50, 60)]
    same = [adapter.map(torch.clone) for adapter in new]
    pending = [
        pool.train([train_job(start, job.client_id, carried=carried) for job in jobs])
        for start, carried in (new, same)
        for jobs in cohorts
    ]
    assert all(plain(cohort.result()) for cohort in pending)
    assert len(sent) == 2, "one start and what all carry, by identity and by content"


def test_a_worker_killed_in_mid_training_is_replaced_without_a_trace(pool, cohorts):
    pool.train(cohorts[0]).result()  # Ray is there
    wanted = [plain(Worker(LONG).train(jobs)) for jobs in cohorts[:3]]
    with closing(RayPool(LONG, workers=2)) as patient, Killer(patient, times=1) as killer:
        pending = [patient.train(jobs) for jobs in cohorts[:3]]
        assert [plain(cohort.result()) for cohort in pending] == wanted
        assert len(killer.killed) == 1 and not psutil.pid_exists(killer.killed[0])


@pytest.mark.nightly  # five workers, one after the other
def test_a_cohort_that_kills_three_workers_is_trained_client_by_client(pool, cohorts):
    """The first of them kills two more by itself and fails; the second is what K = 1 gives."""
    pool.train(cohorts[0]).result()
    wanted = plain(Worker(LONG).train(cohorts[0][1:]))
    with closing(RayPool(LONG, workers=1)) as patient:
        with Killer(patient, times=TRIES + TRIES_ALONE) as killer:
            failed, trained = patient.train(cohorts[0]).result()
            assert len(set(killer.killed)) == TRIES + TRIES_ALONE
        job = cohorts[0][0]
        assert (failed.client_id, failed.digest) == (job.client_id, job.start.digest)
        assert failed.adapter is None
        assert "the worker process died 2 times with this client alone" in failed.cause
        assert plain([trained]) == wanted
        assert plain(patient.train(cohorts[1]).result())


def test_an_idle_worker_that_died_costs_nobody_anything(pool, cohorts):
    pending = [pool.train(jobs) for jobs in cohorts]
    first = [plain(cohort.result()) for cohort in pending]
    wait_until(lambda: processes(pool, "idle"))
    killed = processes(pool, "idle")
    for number in killed:
        os.kill(number, signal.SIGKILL)
    again = [pool.train(jobs) for jobs in cohorts]
    assert [plain(cohort.result()) for cohort in again] == first
    assert not set(killed) & set(processes(pool))


def test_what_a_worker_raises_is_the_cause_of_its_cohort_alone(pool, cohorts):
    strangers = [train_job(cohorts[0][0].start.trained, "nobody")]
    failed = pool.train(strangers).result()[0]
    assert failed.client_id == "nobody" and "nobody" in failed.cause and failed.adapter is None
    assert all(result.adapter is not None for result in pool.train(cohorts[0]).result())


def test_more_workers_than_fit_are_refused_and_take_nobody_with_them(pool, cohorts):
    pool.train(cohorts[0]).result()  # Ray is there
    with closing(RayPool(CONFIG, workers=500)) as crowd:
        with pytest.raises(UserError, match=r"is 500, but the Ray cluster has room for 2: .*CPUs"):
            crowd.train(cohorts[0]).result()
        with pytest.raises(UserError, match=r"engine.workers is 500"):
            crowd.train(cohorts[0])
    assert all(result.adapter is not None for result in pool.train(cohorts[0]).result())


def test_a_worker_that_cannot_load_says_why(pool, cohorts):
    pool.train(cohorts[0]).result()  # Ray is there
    config = CONFIG.with_values({"data.path": "no/such/folder"})
    refused = pytest.raises(UserError, match=r"^data.path .*no/such/folder")
    with closing(RayPool(config, workers=1)) as broken, refused:
        broken.train(cohorts[0]).result()


@pytest.mark.nightly  # three workers, one after the other
def test_workers_that_die_in_loading_end_the_pool_and_not_the_wait(pool, cohorts):
    pool.train(cohorts[0]).result()
    refused = pytest.raises(UserError, match=r"cannot load base and data: 3 died in a row")
    with closing(RayPool(CONFIG, workers=1)) as doomed, Killer(doomed, 3, doing="load"), refused:
        doomed.train(cohorts[0]).result()
    assert plain(pool.train(cohorts[0]).result())


def test_another_cluster_is_not_joined_behind_the_callers_back(pool, cohorts):
    pool.train(cohorts[0]).result()
    refused = pytest.raises(UserError, match=r"127.0.0.1:1', but this process is connected to Ray")
    with closing(RayPool(CONFIG, workers=1, address="127.0.0.1:1")) as other, refused:
        other.train(cohorts[0]).result()


def test_ray_listens_on_the_loopback_alone_and_asks_for_a_token(pool, cohorts):
    pool.train(cohorts[0]).result()  # it is up
    sockets = [s for process, _ in ray_processes() for s in process.net_connections("inet")]
    listening = [s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN]
    reached = [s.raddr.ip for s in sockets if s.raddr]
    assert len(listening) > 3 and len(reached) > 3
    assert {ip.removeprefix("::ffff:") for ip in (*listening, *reached)} == {"127.0.0.1"}
    servers = [process for process, title in ray_processes() if title.endswith("raylet")]
    environment = servers[0].environ()
    assert environment["RAY_AUTH_MODE"] == "token" and len(environment["RAY_AUTH_TOKEN"]) == 64
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


def test_closing_leaves_no_process_no_file_and_no_one_waiting(pool, cohorts):
    ray = import_ray(workers=2, address="")
    pool.train(cohorts[0]).result()
    folder = Path(ray.get_runtime_context().get_temp_dir())
    wait_until(lambda: processes(pool, "idle"))
    numbers = processes(pool)
    assert numbers and folder.is_dir()
    guest, done, errors = RayPool(CONFIG, workers=1), pool.train(cohorts[1]), []
    assert plain(guest.train(cohorts[1]).result())
    done.answer.result(PATIENCE)  # it is done, and nobody has taken it

    def ask():
        try:
            while True:
                pool.train(cohorts[0]).result()
        except RuntimeError as error:
            errors.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    pool.close()
    asking.join(PATIENCE)
    assert errors == ["the pool is closed."]
    assert not any(psutil.pid_exists(number) for number in numbers)
    assert ray_processes() == [] and not folder.exists() and not ray.is_initialized()
    assert plain(done.result()), "results that had come in outlive Ray"
    with pytest.raises(RuntimeError, match="the pool is closed"):
        pool.train(cohorts[0])
    with pytest.raises(RuntimeError, match="Ray was shut down while a pool still used it"):
        guest.train(cohorts[0]).result()
    guest.close()
    pool.close()
    assert not ray.is_initialized(), "the guest started another one"
