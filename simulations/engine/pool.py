"""Where the cohorts of a simulation are trained: in this process, or in several through Ray.

A cohort is a list of jobs that go through one pass together. ``train`` and ``evaluate`` take one
and answer at once with a ``Pending``; ``result()`` waits for it. A client that failed is a result
with a cause, never an exception, so that one client's failure is not another's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from flexlora.config.resolve import Config

if TYPE_CHECKING:  # a pool of other processes starts before this one has loaded torch
    from flexlora.clients.worker import Worker
    from flexlora.wire.jobs import EvalJob, EvalResult, TrainJob, TrainResult

__all__ = ["Later", "LocalPool", "Pending", "Pool", "make_pool"]

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Pending(Protocol[Result_co]):
    """The results of one cohort, in the order of its jobs, now or later."""

    def result(self) -> Result_co:
        """Wait for them; the same object every time."""


class Pool(Protocol):
    """Trains cohorts; the results depend neither on the process nor on the number of processes."""

    def train(self, jobs: Sequence[TrainJob]) -> Pending[list[TrainResult]]: ...

    def evaluate(self, jobs: Sequence[EvalJob]) -> Pending[list[EvalResult]]: ...

    def close(self) -> None:
        """Stop the processes of the pool; unfinished cohorts are lost."""


class LocalPool:
    """One worker in this process.

    A cohort is trained when its result is first asked for, so that only one cohort's factors are
    held at a time, and a cohort whose result is not requested costs nothing.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def train(self, jobs: Sequence[TrainJob]) -> Pending[list[TrainResult]]:
        return Later(lambda: self.worker.train(jobs))

    def evaluate(self, jobs: Sequence[EvalJob]) -> Pending[list[EvalResult]]:
        return Later(lambda: self.worker.evaluate(jobs))

    def close(self) -> None:
        """Nothing was started."""


class Later(Generic[Result]):
    """``work()`` at the first call of ``result``; afterwards only its value is referenced."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work: Callable[[], Result] | None = work

    def result(self) -> Result:
        if self._work is not None:
            self._value, self._work = self._work(), None
        return self._value


def make_pool(config: Config, worker: Worker | None = None) -> Pool:
    """The pool for ``engine.workers`` and ``engine.ray-address``.

    Other processes start in the background: call this before ``worker_for(config)``, and both load
    at the same time. ``worker`` is this process's own, by default ``worker_for(config)``; on CPUs
    it is one of the workers.

    Raises:
        UserError: Ray is asked for and not installed, or an address that is none.
    """
    from flexlora.clients.worker import worker_for

    workers, address = config.engine.workers, config.engine.ray_address
    if workers > 1 or address:
        from flexlora.simulations.engine.ray_pool import RayPool

        return RayPool(config, workers=workers, address=address, local=_local(config, worker))
    return LocalPool(worker or worker_for(config))


def _local(config: Config, worker: Worker | None) -> Callable[[], Worker] | None:
    """This process's worker where it trains too: not with a cluster, nor where Ray assigns GPUs."""
    import torch

    if config.engine.ray_address or (config.engine.device != "cpu" and torch.cuda.is_available()):
        return None

    from flexlora.clients.worker import worker_for

    return lambda: worker or worker_for(config)
