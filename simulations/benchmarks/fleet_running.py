"""Stub nodes (``fleet_node.py``) in one event loop in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from flexlora.simulations.benchmarks.fleet_node import StubNode

__all__ = ["RunningFleet"]

LEAVING_SECONDS = 10.0


class RunningFleet:
    """Nodes in one event loop in a thread of its own, for as long as the block lasts.

    They come in within ``spread_seconds``, so that they do not ask in one breath ever after.
    """

    def __init__(self, nodes: Sequence[StubNode], *, spread_seconds: float = 0.0) -> None:
        self.nodes, self.spread_seconds = nodes, spread_seconds
        self.failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._main: asyncio.Task | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> RunningFleet:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):  # the loop is over: a node was not let in
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(LEAVING_SECONDS)
            if self._main is not None:  # whoever still waits for an answer does so no longer
                self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()

    def entered(self, seconds: float) -> RunningFleet:
        """Once every node has been let in.

        Raises:
            FleetRefused: one was not.
            TimeoutError: not all of them in time.
        """
        deadline = time.monotonic() + seconds
        while self.present < len(self.nodes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.present} of {len(self.nodes)} nodes in {seconds:g} s.")
            time.sleep(0.1)
        return self

    @property
    def present(self) -> int:
        """How many nodes have been let in.

        Raises:
            FleetRefused: one was not.
        """
        if self.failure is not None:
            raise self.failure
        return sum(node.node is not None for node in self.nodes)

    def _work(self) -> None:
        step = self.spread_seconds / len(self.nodes)
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._all(step))
        except BaseException as error:
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self.failure = error

    async def _all(self, step: float) -> None:
        self._main = asyncio.current_task()
        async with asyncio.TaskGroup() as group:
            for place, node in enumerate(self.nodes):
                group.create_task(node.run(self._ended, place * step))
