"""Runs one request at a time; others wait up to ``wait_seconds``, then fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Busy", "RequestLock"]

POLL_SECONDS = 0.2  # between checks whether a waiting caller is still connected


class Busy(Exception):
    """Why a request did not get the lock."""


class RequestLock:
    """A lock that can say what holds it.

    Args:
        wait_seconds: how long a request waits for the one before it.
        most_waiting: how many may wait; each holds a thread, and health must stay askable.
    """

    def __init__(self, *, wait_seconds: float, most_waiting: int = 4) -> None:
        self.wait_seconds, self.most_waiting = wait_seconds, most_waiting
        self._lock, self._counting = threading.Lock(), threading.Lock()
        self._waiting = 0
        self._doing, self._since = "", 0.0
        self.stopping = False

    @property
    def current(self) -> tuple[str, float]:
        """The running request and its age in seconds; "" when idle."""
        doing = self._doing
        return doing, time.monotonic() - self._since if doing else 0.0

    def close(self, seconds: float) -> bool:
        """Refuse further requests; whether the running one ended within ``seconds``."""
        self.stopping = True
        if not self._lock.acquire(timeout=max(0.0, seconds)):
            return False
        self._lock.release()
        return True

    @contextmanager
    def held(self, doing: str, alive: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """The lock, for as long as the block lasts.

        Raises:
            Busy: too many wait, the wait was too long, the caller has gone, or the trainer stops.
        """
        self._wait(alive)
        try:
            self._doing, self._since = doing, time.monotonic()
            yield
        finally:
            self._doing = ""
            self._lock.release()

    def _wait(self, alive: Callable[[], bool]) -> None:
        with self._counting:
            if self._waiting >= self.most_waiting:
                raise Busy(f"{self._busy()}, and {self._waiting} more requests wait")
            self._waiting += 1
        deadline = time.monotonic() + self.wait_seconds
        try:
            while not self.stopping:
                left = deadline - time.monotonic()
                if self._lock.acquire(timeout=max(0.0, min(POLL_SECONDS, left))):
                    if not self.stopping:
                        return
                    self._lock.release()
                elif left <= 0:
                    raise Busy(f"{self._busy()}; this request waited {self.wait_seconds:.0f} s")
                elif not alive():
                    raise Busy("the caller has gone")
            raise Busy("the trainer is stopping")
        finally:
            with self._counting:
                self._waiting -= 1

    def _busy(self) -> str:
        doing, seconds = self.current
        return f"the trainer is busy ({doing}, for {seconds:.0f} s)"
