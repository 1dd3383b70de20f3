"""The dealing of cohorts to Ray's actors, in one thread.

Cohorts go to free workers in the order in which they came. A worker that dies, killed or out of
memory, is replaced, and its cohort is tried again by the next that is free; Ray's own restarts
would leave it waiting for a machine that is lost. It may die of one client, so this process, which
would take the run with it, leaves such a cohort to the workers, and after three deaths each client
is tried by itself: only those that kill a worker alone fail. Every death counts towards a limit, so
a round ends even where every worker dies.

The thread that starts Ray is the one that ends it: the kernel ends Ray's processes together with
the thread that started them. The rest of the program goes on meanwhile.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import flexlora
from flexlora.config.resolve import Config
from flexlora.errors import UserError, one_line
from flexlora.simulations.engine import ray_start
from flexlora.simulations.engine.ray_actor import CohortActor, Key, pack, swapped

if TYPE_CHECKING:
    from flexlora.lora.adapters import Adapter
    from flexlora.simulations.engine.ray_pool import Cohort

__all__ = ["Dispatcher"]

TRIES = 3  # of one cohort; of one worker to load
TRIES_ALONE = 2  # of a client whose cohort died so often: one of them may be an accident
AHEAD = 3  # cohorts per worker that are in work, or done and not taken: their factors are held


class _Payload:
    """An adapter that jobs share: it goes to Ray's object store once, when it is first needed."""

    def __init__(self, adapter: Adapter, key: str) -> None:
        self.adapters, self.key = [adapter], Key(key)  # adapters: all that are the same
        self.reference: Any = None

    def put(self) -> Any:
        import ray

        if self.reference is None:
            self.reference = ray.put(pack(self.adapters[0]))
        return self.reference


class Dispatcher:
    """The thread that starts Ray, deals cohorts to workers, replaces the dead and ends it all.

    It works off ``events``; what Ray has finished arrives there too. ``submit`` and ``close`` are
    for other threads, everything else runs in its own.
    """

    def __init__(
        self, config: Config, workers: int, address: str, need: ray_start.Need, here: int = 0
    ) -> None:
        self.config, self.workers, self.address, self.need = config, workers, address, need
        self.here = here  # workers in this process, which the caller counts too
        self.began, self.seconds = time.perf_counter(), dict[str, float]()
        self.events: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.lock = threading.Lock()  # over these two, and over memory that ends with Ray
        self.ended: Exception | None = None
        self.unsettled: set[Cohort] = set()
        self.queue: deque[Cohort] = deque()
        self.held: weakref.WeakSet[Cohort] = weakref.WeakSet()  # done, not taken
        self.payloads: weakref.WeakValueDictionary[int | str, _Payload]
        self.payloads = weakref.WeakValueDictionary()  # by identity and by digest
        self.recent: deque[dict[Key, _Payload]]  # alive for the cohorts to come that share them
        self.recent = deque(maxlen=AHEAD * workers)
        self.numbers = itertools.count()
        self.actors: set[Any] = set()  # Ray's word for workers
        self.placed: dict[Any, int] = {}  # the number of each one's process, on its machine
        self.idle: deque[Any] = deque()
        self.busy: dict[Any, Cohort] = {}
        self.ask: dict[str, Any] = {}
        self.loaded: Any = None  # what the first worker said of its base and data
        self.thread = threading.Thread(target=self._run, name="flexlora-ray", daemon=True)
        self.thread.start()

    def submit(self, cohort: Cohort) -> None:
        with self.lock:
            if self.ended is not None:
                raise self.ended
            self.unsettled.add(cohort)
            self.queue.append(cohort)
        self.events.put(self._deal)

    def claim(self, wanted: Cohort) -> Cohort | None:
        """A cohort for the caller to train itself: ``wanted``, or the next that nobody has begun.

        None where all are in work, or enough are done and not taken. A cohort of which a worker
        has died is never given: there is always a worker for it, or the pool ends.
        """
        with self.lock:
            if self.ended is not None:
                return None
            harmless = [cohort for cohort in self.queue if not cohort.suspect]
            chosen = wanted if wanted in harmless else None
            if chosen is None and harmless and not self._full():
                chosen = harmless[0]
            if chosen is not None:
                self.queue.remove(chosen)
            return chosen

    def done(self, cohort: Cohort, answer: list[Any] | str) -> None:
        """What the caller made of a cohort that it had claimed."""
        self._settle(cohort, answer)

    def close(self) -> None:
        self.events.put(None)
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def _run(self) -> None:
        ended: Exception = RuntimeError("the pool is closed.")
        session = None
        try:
            session = (
                ray_start.join(self.address) if self.address else ray_start.start(self.workers)
            )
            self.seconds["ray"] = time.perf_counter() - self.began
            self.ask = ray_start.placement(
                self.config, session, self.workers, self.need, here=self.here
            )
            for _ in range(self.workers):
                self._spawn()
            while (event := self._next_event()) is not None:
                _check_connected()
                event()
        except Exception as error:  # whatever it is, those who wait must hear of it
            ended = error
        with self.lock:
            self.ended, unsettled = ended, list(self.unsettled)
            self.unsettled.clear()
        for cohort in unsettled:
            cohort.answer.set_exception(ended)
        if session is not None:
            for actor in self.actors:
                self._kill(actor)
            session.end()

    def _next_event(self) -> Callable[[], None] | None:
        seconds, workers = self.config.server.wait_seconds, self.workers + self.here
        try:
            return self.events.get(timeout=None if self.placed else seconds)
        except Empty:
            raise UserError(
                f"engine.workers is {workers}, but Ray has placed no worker within "
                f"{seconds:g} s (server.wait-seconds); is the cluster busy with other work?"
            ) from None

    def _spawn(self, lost: int = 0) -> None:
        """One more worker; ``lost`` died before it in the same place and never loaded."""
        import ray

        actor = ray.remote(CohortActor).options(**self.ask).remote(self.config.flat())
        self.actors.add(actor)
        self._watch(actor.placed.remote(), partial(self._placed, actor))
        self._watch(actor.load.remote(), partial(self._loaded, actor, lost))

    def _watch(self, reference: Any, then: Callable[[Future], None]) -> None:
        """``then(answer)`` as an event of its own when Ray has it."""

        def done(answer: Future) -> None:
            self.events.put(partial(then, answer))

        reference.future().add_done_callback(done)

    def _placed(self, actor: Any, answer: Future) -> None:
        if answer.exception() is not None:
            return  # `_loaded` hears of it too
        version, self.placed[actor] = answer.result()
        if version != flexlora.__version__:
            raise UserError(
                f"a Ray worker runs FlexLoRA {version}, this process "
                f"{flexlora.__version__}; install the same on every machine of the cluster."
            )

    def _loaded(self, actor: Any, lost: int, answer: Future) -> None:
        error = answer.exception()
        if error is None:
            self.loaded = self.loaded or answer.result()
            if answer.result() != self.loaded:
                raise UserError(
                    "two Ray workers hold different bases or clients; every machine of the "
                    "cluster needs the same model.name and data."
                )
            now = time.perf_counter() - self.began
            self.seconds = {"first worker": now, **self.seconds, "last worker": now}
            self.idle.append(actor)
            self._deal()
        elif (cause := _raised(error)) is not None:
            raise cause if isinstance(cause, UserError) else _cannot_load(one_line(cause))
        elif lost + 1 < TRIES:
            self._replace(actor, lost + 1)
        else:
            raise _cannot_load(f"{TRIES} died in a row, the last so: {_death(error)}")

    def _replace(self, actor: Any, lost: int = 0) -> None:
        self._kill(actor)
        self.actors.discard(actor)
        self.placed.pop(actor, None)
        self._spawn(lost)

    def _check_idle(self) -> None:
        """Whoever died may have died with its machine, and idle ones with it: nobody told us."""
        while self.idle:
            actor = self.idle.popleft()
            self._watch(actor.placed.remote(), partial(self._checked, actor))

    def _checked(self, actor: Any, answer: Future) -> None:
        if answer.exception() is None:
            self.idle.append(actor)
            self._deal()
        else:
            self._replace(actor)

    def _kill(self, actor: Any) -> None:
        import ray

        with suppress(Exception):  # it may be gone already
            _check_connected()
            ray.kill(actor)

    def _slim(self, cohort: Cohort) -> None:
        """The jobs with keys in the place of adapters, once a worker is to have them."""
        from flexlora.lora.adapters import Adapter

        def key(adapter: Adapter) -> Key:
            payload = self._payload(adapter)
            cohort.payloads[payload.key] = payload
            return payload.key

        cohort.slim = [swapped(job, Adapter, key) for job in cohort.jobs]
        self.recent.append(cohort.payloads)

    def _payload(self, adapter: Adapter) -> _Payload:
        """One for all adapters that are the same object or hold the same bytes."""
        if id(adapter) not in self.payloads:
            digest = adapter.digest()
            payload = self.payloads.get(digest) or _Payload(adapter, str(next(self.numbers)))
            payload.adapters.append(adapter)  # alive, so that no other gets its identity
            self.payloads[digest] = self.payloads[id(adapter)] = payload
        return self.payloads[id(adapter)]

    def want(self, cohort: Cohort) -> None:
        """Somebody waits for it: it goes first, however many are done and not taken."""
        for wanted in (cohort, *cohort.parts):
            wanted.wanted = True
        self._deal()

    def release(self, cohort: Cohort) -> None:
        """Its results are taken."""
        with self.lock:
            self.held.discard(cohort)
        self._deal()

    def _deal(self) -> None:
        """Cohorts to free workers."""
        while self.idle and (cohort := self._next_cohort()) is not None:
            actor = self.idle.popleft()
            self.busy[actor] = cohort
            if not cohort.slim:
                self._slim(cohort)
            references = [payload.put() for payload in cohort.payloads.values()]
            work = getattr(actor, cohort.kind)
            sent = work.remote(cohort.slim, list(cohort.payloads), *references)
            self._watch(sent, partial(self._answered, actor))

    def _next_cohort(self) -> Cohort | None:
        with self.lock:
            wanted = next((cohort for cohort in self.queue if cohort.wanted), None)
            if wanted is not None:
                self.queue.remove(wanted)
                return wanted
            return None if self._full() or not self.queue else self.queue.popleft()

    def _full(self) -> bool:
        return len(self.busy) + len(self.held) >= AHEAD * self.workers

    def _answered(self, actor: Any, answer: Future) -> None:
        cohort, error = self.busy.pop(actor), answer.exception()
        cause = _raised(error)
        if error is None or cause is not None:
            self.idle.append(actor)
            self._deal()
            self._settle(cohort, answer.result() if cause is None else one_line(cause))
            return
        self._died(cohort, error)
        self._replace(actor)
        self._check_idle()

    def _died(self, cohort: Cohort, error: BaseException) -> None:
        """A worker died of ``cohort``: it is tried again, then its clients one by one."""
        cohort.tries, cohort.suspect = cohort.tries + 1, True
        again = [cohort]
        if cohort.tries == (TRIES if cohort.whole is None else TRIES_ALONE):
            again = cohort.split() if len(cohort.jobs) > 1 else []
        with self.lock:
            self.unsettled.update(again)
            self.queue.extendleft(reversed(again))
        if not again:
            cause = f"the worker process died {cohort.tries} times with this client alone in it"
            remedy = "if memory ran out, lower train.per-device-train-batch-size or its rank"
            self._settle(cohort, f"{cause} ({_death(error)}); {remedy}")

    def _settle(self, cohort: Cohort, answer: list[Any] | str) -> None:
        with self.lock:
            if cohort not in self.unsettled:
                return  # the pool has ended meanwhile, and it was told so
            self.unsettled.discard(cohort)
            if cohort.whole is None:
                self.held.add(cohort)
        cohort.slim, cohort.payloads = [], {}
        cohort.answer.set_result(answer)
        if cohort.whole is not None and (joined := cohort.whole.joined()) is not None:
            self._settle(cohort.whole, joined)


def _check_connected() -> None:
    """Ray's calls would start another Ray, open to all, where ours was shut down behind our back.

    Raises:
        RuntimeError: it was.
    """
    import ray

    if not ray.is_initialized():
        raise RuntimeError("Ray was shut down while a pool still used it.")


def _raised(error: BaseException | None) -> BaseException | None:
    """What the actor's own code raised; None where there is no error, or the actor is no more."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        return getattr(error, "cause", None) or error
    return None


def _death(error: BaseException) -> str:
    """What Ray knows of a worker's end."""
    import ray

    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "the machine ran out of memory"  # Ray's own sentence is a page of numbers
    return one_line(error).rstrip(".")


def _cannot_load(why: str) -> UserError:
    return UserError(
        f"a Ray worker cannot load base and data: {why.rstrip('.')}; every machine needs FlexLoRA, "
        "model and data, and memory for them."
    )
