"""Cohorts spread over processes or GPUs through Ray (Moritz et al., OSDI 2018, arXiv 1712.05889).

Every worker is an actor that holds base and data of the configuration. The number of threads is the
same in each, so the results are those of one process, byte for byte, whichever trained them. One
thread here serves each worker: it takes the next cohort, waits for the answer, and starts a
successor when the worker dies.

A cohort whose worker died, killed or out of memory, goes back to the head of the queue, so any free
worker may retry it (Ray's own restarts would wait for a machine that may be lost). After ``TRIES``
deaths its clients are retried one by one, and only those that kill a worker alone fail. Every death
counts towards a limit, so a round ends even where every worker dies. This process never trains such
a cohort: it would take the run with it.

``ray_start.py`` starts Ray and says how many workers fit; ``ray_actor.py`` runs in the workers.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import flexlora
from flexlora.config.resolve import Config, resolved
from flexlora.errors import UserError, one_line
from flexlora.simulations.engine import ray_start
from flexlora.simulations.engine.ray_actor import CohortActor, Key, Parcel, pack, swapped, unpack
from flexlora.simulations.engine.ray_cohort import TRIES, Cohort, failed

if TYPE_CHECKING:
    from flexlora.clients.worker import Worker
    from flexlora.lora.adapters import Adapter
    from flexlora.wire.jobs import EvalJob, TrainJob

__all__ = ["RayPool"]

AHEAD = 3  # cohorts per worker in work, or done and not taken: bounds the factors in memory


class RayPool:
    """``workers`` processes on this machine, or on the Ray cluster at ``address``.

    With ``local`` this process is one of them: while it waits for a cohort it trains the next one
    itself, from the start, when Ray is not there yet.

    Returns at once: Ray starts and the workers load in the background. What goes wrong there is
    raised by the next call, and by ``result()`` of every unfinished cohort.

    Raises:
        UserError: Ray is not installed; later: it does not start, nothing answers at the address,
            there is too little memory for so many workers, a worker cannot load.
    """

    def __init__(
        self,
        config: Config,
        *,
        workers: int,
        address: str = "",
        local: Callable[[], Worker] | None = None,
    ) -> None:
        self.config, self.address, self.local = resolved(config), address, local
        ray_start.import_ray(workers=workers, address=address)
        self.asked, self.workers = workers, workers - (local is not None)
        self.need = ray_start.Need.of(self.config)
        self.changed = threading.Condition(threading.RLock())  # over everything below
        self.ended: Exception | None = None
        self.queue: deque[Cohort] = deque()
        self.in_work: set[Cohort] = set()
        self.untaken: weakref.WeakSet[Cohort] = weakref.WeakSet()  # done, results not taken yet
        self.sent: deque[dict[Key, Any]] = deque(maxlen=AHEAD * self.workers)
        self.processes: dict[Any, list] = {}  # by actor: process id and what it does
        self.resources: dict[str, Any] = {}  # that every worker asks Ray for
        self.loaded: Any = None  # base and clients of all workers
        # The kernel ends Ray's processes together with the thread that started them.
        self.thread = threading.Thread(target=self._run, name="flexlora-ray", daemon=True)
        atexit.register(self.close)  # before Ray's own: the last one in is the first
        self.thread.start()

    def train(self, jobs: Sequence[TrainJob]) -> Cohort:
        return self._submit("train", jobs)

    def evaluate(self, jobs: Sequence[EvalJob]) -> Cohort:
        return self._submit("evaluate", jobs)

    def close(self) -> None:
        """End the workers and, where it was started here, Ray; returns when they are gone."""
        self._end(RuntimeError("the pool is closed."))
        self.thread.join()
        atexit.unregister(self.close)

    def _submit(self, kind: str, jobs: Sequence[Any]) -> Cohort:
        cohort = Cohort(kind, jobs, self)
        with self.changed:
            if self.ended is not None:
                raise self.ended
            self.queue.append(cohort)
            self.changed.notify_all()
        return cohort

    def train_here(self, wanted: Cohort) -> None:
        """Train queued cohorts in this process until ``wanted`` is done or none is left.

        What is not done then is wanted from the workers first.
        """
        while self.local is not None and not wanted.answer.done():
            cohort = self.claim(wanted)
            if cohort is None:
                break
            try:
                results = getattr(self.local(), cohort.kind)(cohort.jobs)
            except Exception as error:  # as in a worker elsewhere: the cause of this cohort alone
                results = [failed(job, one_line(error)) for job in cohort.jobs]
            self._finish(cohort, results)
        with self.changed:
            wanted.wanted = True
            self.untaken.discard(wanted)
            self.changed.notify_all()

    def claim(self, wanted: Cohort) -> Cohort | None:
        """``wanted`` or the next queued cohort, for this process; none that has killed a worker.

        None where all are in work, or enough are done and not taken.
        """
        with self.changed:
            harmless = [cohort for cohort in self.queue if not cohort.deaths]
            chosen = wanted if wanted in harmless else None
            if chosen is None and harmless and not self._full():
                chosen = harmless[0]
            if chosen is not None:
                self.queue.remove(chosen)
                self.in_work.add(chosen)
            return chosen

    def _full(self) -> bool:
        return len(self.in_work) + len(self.untaken) >= AHEAD * self.workers

    def _finish(self, cohort: Cohort, results: Sequence[Any]) -> None:
        """Add results of a cohort in work; queue the rest of it, at the head."""
        with self.changed:
            self.in_work.discard(cohort)
            cohort.add(results)
            if self.ended is not None:
                return  # its answer is the pool's end
            if len(cohort.results) < len(cohort.jobs):
                self.queue.appendleft(cohort)
            else:
                if not cohort.wanted:
                    self.untaken.add(cohort)
                cohort.answer.set_result(cohort.results)
                cohort.jobs = []
            self.changed.notify_all()

    def _end(self, error: Exception) -> None:
        """The end of the pool: every cohort that is not done raises ``error``."""
        with self.changed:
            if self.ended is not None:
                return
            self.ended = error
            unfinished = [*self.queue, *self.in_work]
            self.queue.clear()
            self.changed.notify_all()
        for cohort in unfinished:
            cohort.answer.set_exception(error)

    def _run(self) -> None:
        """Start Ray and a thread per worker; end both when the pool ends."""
        session, threads = None, list[threading.Thread]()
        try:
            session = (
                ray_start.join(self.address) if self.address else ray_start.start(self.workers)
            )
            self.resources = ray_start.placement(
                self.config, session, self.workers, self.need, here=self.asked - self.workers
            )
            threads = [
                threading.Thread(target=self._serve, daemon=True) for _ in range(self.workers)
            ]
            for thread in threads:
                thread.start()
            with self.changed:
                self.changed.wait_for(lambda: self.ended is not None)
        except Exception as error:  # raised again by every waiting result()
            self._end(error)
        for actor in list(self.processes):
            self._kill(actor)
        for thread in threads:
            thread.join(timeout=ray_start.GRACE_SECONDS)
        if session is not None:
            session.end()

    def _serve(self) -> None:
        """One worker and its successors, cohort after cohort, until the pool ends."""
        try:
            while self.ended is None:
                actor = self._start_worker()
                while (cohort := self._next(actor)) is not None:
                    try:
                        results = self._ask(actor, cohort)
                    except WorkerDied as death:
                        cohort.died(str(death))
                        self._finish(cohort, [])
                        break
                    self._finish(cohort, results)
                self._kill(actor)
        except Exception as error:
            self._end(error)

    def _next(self, actor: Any) -> Cohort | None:
        """The next cohort for an idle worker; None where the worker has died or the pool ended."""
        self._mark(actor, "idle")
        with self.changed:
            while (chosen := self._most_urgent()) is None and self.ended is None:
                self.changed.wait()
            if chosen is None:
                return None
            self.queue.remove(chosen)
            self.in_work.add(chosen)
        try:  # an idle worker may have died, with its whole machine
            _call(actor.process_id)
        except WorkerDied:
            self._finish(chosen, [])
            return None
        self._mark(actor, "train")
        return chosen

    def _most_urgent(self) -> Cohort | None:
        wanted = next((cohort for cohort in self.queue if cohort.wanted), None)
        return wanted or (self.queue[0] if self.queue and not self._full() else None)

    def _ask(self, actor: Any, cohort: Cohort) -> list[Any]:
        """The results of a cohort's remaining jobs; failures where the worker raised."""
        import ray

        jobs = cohort.remaining
        slim, references = self._without_adapters(jobs)
        work = getattr(actor, cohort.kind)
        try:
            answer = _call(work, slim, list(references), *references.values())
        except ray.exceptions.RayTaskError as error:
            return [failed(job, one_line(_cause(error))) for job in jobs]
        return [swapped(result, Parcel, unpack) for result in answer]

    def _without_adapters(self, jobs: Sequence[Any]) -> tuple[list[Any], dict[Key, Any]]:
        """Jobs with keys in the place of adapters, and Ray's reference to each adapter.

        An adapter that recent cohorts had, by its bytes, is in Ray's store already.
        """
        import ray

        from flexlora.lora.adapters import Adapter

        digests: dict[int, Key] = {}
        references: dict[Key, Any] = {}
        with self.changed:
            self.sent.append(references)

        def key(adapter: Adapter) -> Key:
            if id(adapter) not in digests:
                digest = digests[id(adapter)] = Key(adapter.digest())
                with self.changed:
                    known = [sent[digest] for sent in self.sent if digest in sent]
                    references[digest] = known[0] if known else ray.put(pack(adapter))
            return digests[id(adapter)]

        return [swapped(job, Adapter, key) for job in jobs], references

    def _start_worker(self) -> Any:
        """An actor that has loaded base and data.

        Raises:
            UserError: it cannot load, it dies in loading again and again, it is not placed.
        """
        import ray

        how = ""
        for _ in range(TRIES):
            _check_connected()
            kind: Any = ray.remote(CohortActor)  # Ray's types know no method of an actor
            actor = kind.options(**self.resources).remote(self.config.flat())
            with self.changed:
                if self.ended is not None:
                    raise self.ended
                self.processes[actor] = [None, "wait"]
            try:
                self._wait_for_place(actor)
                found = _call(actor.load)
            except WorkerDied as death:
                how = str(death)
                self._kill(actor)
                continue
            except ray.exceptions.RayTaskError as error:
                cause = _cause(error)
                known = isinstance(cause, UserError)
                raise (cause if known else _cannot_load(one_line(cause))) from None
            self._check_same(*found)
            return actor
        raise _cannot_load(f"{TRIES} died in a row, the last so: {how}")

    def _wait_for_place(self, actor: Any) -> None:
        """Wait for the actor's process; at most server.wait-seconds where no worker has one."""
        import ray

        seconds = self.config.server.wait_seconds
        while True:
            try:
                self.processes[actor] = [_call(actor.process_id, timeout=seconds), "load"]
                return
            except ray.exceptions.GetTimeoutError:
                if not any(process for process, _ in list(self.processes.values())):
                    raise UserError(
                        f"engine.workers is {self.asked}, but Ray has placed no worker within "
                        f"{seconds:g} s (server.wait-seconds); is the cluster busy with other work?"
                    ) from None

    def _check_same(self, version: str, *found: Any) -> None:
        """Every worker runs this FlexLoRA and holds the same base and clients."""
        if version != flexlora.__version__:
            raise UserError(
                f"a Ray worker runs FlexLoRA {version}, this process "
                f"{flexlora.__version__}; install the same on every machine of the cluster."
            )
        with self.changed:
            self.loaded = self.loaded or found
        if found != self.loaded:
            raise UserError(
                "two Ray workers hold different bases or clients; every machine of the "
                "cluster needs the same model.name and data."
            )

    def _mark(self, actor: Any, doing: str) -> None:
        with suppress(KeyError):  # killed at the end of the pool
            self.processes[actor][1] = doing

    def _kill(self, actor: Any) -> None:
        import ray

        self.processes.pop(actor, None)
        with suppress(Exception):  # it may be gone already
            _check_connected()
            ray.kill(actor)


class WorkerDied(Exception):
    """A worker process ended while it was loading or training; the message says how."""


def _call(method: Any, *args: Any, timeout: float | None = None) -> Any:
    """The answer of an actor's method.

    Raises:
        WorkerDied: the actor's process has ended.
        RayTaskError: its own code raised. GetTimeoutError: no answer in ``timeout`` seconds.
    """
    import ray

    _check_connected()
    try:
        return ray.get(method.remote(*args), timeout=timeout)
    except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError):
        raise
    except ray.exceptions.OutOfMemoryError:  # Ray's own sentence is a page of numbers
        raise WorkerDied("the machine ran out of memory") from None
    except ray.exceptions.RayError as error:
        raise WorkerDied(one_line(error).rstrip(".")) from None


def _cause(error: Any) -> BaseException:
    """What the actor's own code raised."""
    return getattr(error, "cause", None) or error


def _check_connected() -> None:
    """Ray's calls would start another Ray, open to all, after ours was shut down.

    Raises:
        RuntimeError: Ray is shut down.
    """
    import ray

    if not ray.is_initialized():
        raise RuntimeError("Ray was shut down while a pool still used it.")


def _cannot_load(why: str) -> UserError:
    return UserError(
        f"a Ray worker cannot load base and data: {why.rstrip('.')}; every machine needs FlexLoRA, "
        "model and data, and memory for them."
    )
