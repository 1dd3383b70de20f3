"""Cohorts spread over processes or GPUs through Ray (Moritz et al., OSDI 2018, arXiv 1712.05889).

Every worker is an actor that holds base and data of the configuration. The number of threads is the
same in each, so the results are those of one process, byte for byte, whoever trained them. Files:
``ray_start.py`` starts Ray and says how many workers fit, ``ray_dispatch.py`` deals the cohorts,
``ray_actor.py`` is what runs in the other processes.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from flexlora.config.resolve import Config, resolved
from flexlora.errors import one_line
from flexlora.simulations.engine.pool import Pending
from flexlora.simulations.engine.ray_actor import Key, Parcel, swapped, unpack
from flexlora.simulations.engine.ray_dispatch import Dispatcher
from flexlora.simulations.engine.ray_start import Need, import_ray

if TYPE_CHECKING:
    from flexlora.clients.worker import Worker
    from flexlora.wire.jobs import EvalJob, EvalResult, TrainJob, TrainResult

__all__ = ["Cohort", "RayPool"]


class RayPool:
    """``workers`` processes on this machine, or on the Ray cluster at ``address``.

    With ``local`` this process is one of them: while it waits for a cohort it trains the next one
    itself, from the start, when Ray is not there yet. Whoever trains it, its bytes are the same.

    Returns at once: Ray starts and the workers load in the background. What goes wrong there is
    raised by the next call, and by ``result()`` of every cohort that waits. ``seconds`` says when
    Ray was there, and the first and the last worker, counted from here.

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
        config = resolved(config)
        import_ray(workers=workers, address=address)
        here = int(local is not None)
        self._local = local
        self._dispatcher = Dispatcher(config, workers - here, address, Need.of(config), here)
        self._close = weakref.finalize(self, _close, self._dispatcher)
        self._close.atexit = False
        atexit.register(self._dispatcher.close)  # before Ray's own: the last one in is the first

    @property
    def seconds(self) -> dict[str, float]:
        return dict(self._dispatcher.seconds)

    def train(self, jobs: Sequence[TrainJob]) -> Pending[list[TrainResult]]:
        return self._submit("train", jobs)

    def evaluate(self, jobs: Sequence[EvalJob]) -> Pending[list[EvalResult]]:
        return self._submit("evaluate", jobs)

    def close(self) -> None:
        """End the workers and, where it was started here, Ray; returns when they are gone."""
        self._close()

    def _submit(self, kind: str, jobs: Sequence[Any]) -> Cohort:
        cohort = Cohort(kind, jobs, self._dispatcher, self._local)
        self._dispatcher.submit(cohort)
        return cohort


def _close(dispatcher: Dispatcher) -> None:
    atexit.unregister(dispatcher.close)
    dispatcher.close()


class Cohort:
    """Jobs on their way to a worker, and what came back."""

    def __init__(
        self,
        kind: str,
        jobs: Sequence[Any],
        dispatcher: Dispatcher,
        local: Callable[[], Worker] | None,
    ) -> None:
        self.kind, self.jobs, self.dispatcher = kind, list(jobs), dispatcher
        self.local = local
        self.payloads: dict[Key, Any] = {}
        self.slim: list[Any] = []  # the jobs with keys in the place of adapters
        self.wanted, self.tries = False, 0
        self.suspect = False  # a worker died of it, or of the cohort that it was a part of
        self.whole: Cohort | None = None
        self.parts: list[Cohort] = []  # where it was split, each with one job
        self.answer: Future[list[Any] | str] = Future()  # results, or why there are none
        self._results: list[Any] | None = None

    def result(self) -> list[Any]:
        if self._results is None:
            self._help()
            if not self.answer.done():
                self.dispatcher.events.put(partial(self.dispatcher.want, self))
            self._results = self._received(self.answer.result())
            self.answer, self.jobs = Future(), []
            self.dispatcher.events.put(partial(self.dispatcher.release, self))
        return self._results

    def split(self) -> list[Cohort]:
        """Each client by itself; whoever wanted all of them wants each."""
        for job in self.jobs:
            part = Cohort(self.kind, [job], self.dispatcher, None)
            part.whole, part.suspect, part.wanted = self, True, self.wanted
            self.parts.append(part)
        return self.parts

    def joined(self) -> list[Any] | None:
        """What its parts came to, a failure where one failed; None while some are not done."""
        if not all(part.answer.done() for part in self.parts):
            return None
        results = []
        for part in self.parts:
            answer = part.answer.result()
            results += [_failed(part.jobs[0], answer)] if isinstance(answer, str) else answer
        self.parts = []
        return results

    def _help(self) -> None:
        """Train here what nobody has begun, until this cohort is done or nothing is left."""
        while self.local is not None and not self.answer.done():
            cohort = self.dispatcher.claim(self)
            if cohort is None:
                return
            try:
                answer = getattr(self.local(), cohort.kind)(cohort.jobs)
            except Exception as error:  # as in a worker elsewhere: the cause of this cohort alone
                answer = one_line(error)
            self.dispatcher.done(cohort, answer)

    def _received(self, answer: list[Any] | str) -> list[Any]:
        """The results in memory of this process: what Ray holds is gone when the pool closes."""
        if isinstance(answer, str):
            return [_failed(job, answer) for job in self.jobs]
        with self.dispatcher.lock:
            if self.dispatcher.ended is not None:
                raise self.dispatcher.ended
            return [swapped(result, Parcel, unpack) for result in answer]


def _failed(job: Any, cause: str) -> Any:
    """The result of a client whose cohort brought none."""
    from flexlora.clients.worker import failed_training
    from flexlora.wire.jobs import EvalResult, TrainJob

    if isinstance(job, TrainJob):
        return failed_training(job, cause)
    return EvalResult(client_id=job.client_id, cause=cause)
