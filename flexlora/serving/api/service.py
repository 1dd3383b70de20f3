"""What the endpoints share: the engine in its thread, the models by name, the calls in progress."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flexlora.errors import UserError, nearest, one_line
from flexlora.serving.api.calls import Bell, Call
from flexlora.serving.api.errors import ApiError
from flexlora.serving.api.metrics import Metrics
from flexlora.serving.api.token_bytes import TokenBytes
from flexlora.serving.limits import Stats
from flexlora.serving.prompts import Prompts
from flexlora.serving.requests import EngineFull, Request

__all__ = ["AdapterNames", "Service", "ServiceLimits", "ServingEngine"]

LOG = logging.getLogger(__name__)
RATE_CALLS, RATE_SECONDS, LONGEST_RETRY = 64, 30.0, 30
STOPPING = "the server is stopping."


class ServingEngine(Protocol):
    """The engine as the service uses it (``flexlora/serving/engine.py``)."""

    max_length: int
    ends: frozenset[int]

    def submit(self, request: Request, on_piece: Any) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def run(self, stop: threading.Event) -> None: ...
    def stats(self) -> Stats: ...


class AdapterNames(Protocol):
    """The adapter store as the service uses it (``flexlora/serving/adapter_store.py``)."""

    def names(self) -> list[str]: ...
    def add(self, name: str, source: Path, *, replace: bool = False) -> None: ...
    def remove(self, name: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """Bounds in seconds.

    Args:
        call_seconds: from the arrival of a call to the end of its answer.
        stuck_seconds: without any piece while calls are waiting: the server calls itself ill.
    """

    call_seconds: float = 600.0
    stuck_seconds: float = 120.0


class Service:
    """One engine and its adapters for many HTTP calls.

    ``begin`` and everything that makes a ``Call`` run in the event loop. ``base_name`` is the
    base's name as a model.
    """

    def __init__(
        self,
        engine: ServingEngine,
        adapters: AdapterNames,
        prompts: Prompts,
        token_bytes: TokenBytes,
        *,
        base_name: str,
        limits: ServiceLimits | None = None,
    ) -> None:
        self.engine, self.adapters, self.prompts = engine, adapters, prompts
        self.token_bytes, self.base_name = token_bytes, base_name
        self.limits = limits or ServiceLimits()
        self.metrics = Metrics(engine.stats)
        self.failure = ""  # why the engine's thread has ended, where nobody stopped it
        self.closing = False
        self.started_at = int(time.time())
        self._calls: set[Call] = set()
        self._heard_at = time.monotonic()
        self._ended: deque[float] = deque(maxlen=RATE_CALLS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self) -> None:
        """Start the engine's thread; to be called in the event loop that serves."""
        self._loop = asyncio.get_running_loop()
        self._bell = Bell(self._loop)
        self._thread.start()

    def end(self, seconds: float) -> bool:
        """Stop the engine's thread; False where it has not ended in time."""
        self._stop.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.engine.run(self._stop)
            cause = "" if self._stop.is_set() else "its thread has ended"
        except Exception as error:
            LOG.exception("the engine has failed")
            cause = one_line(error)
        if cause:
            self.failure = cause
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self.cut, f"the engine failed: {cause}")

    def models(self) -> list[str]:
        """The base, then the adapters."""
        return [self.base_name, *self.adapters.names()]

    def adapter_of(self, model: str) -> str | None:
        """The adapter that ``model`` names, None for the base.

        Raises:
            ApiError: there is no such model.
        """
        if model == self.base_name:
            return None
        names = self.models()
        if model not in names:
            hint = nearest(model, names) or f" {len(names)} models are listed at /v1/models."
            raise ApiError(
                404,
                f"the model '{model}' does not exist.{hint}",
                param="model",
                code="model_not_found",
            )
        return model

    def call(
        self, requests: Sequence[Request], *, each_piece: bool, arrived_at: float | None = None
    ) -> Call:
        """Submit the requests of one HTTP call.

        Raises:
            ApiError: the server is stopping, the engine has failed or is full, the adapter was
                removed in between.
            UserError: as ``Engine.submit``.
        """
        if self.closing or self.failure:
            text = STOPPING if self.closing else f"the engine failed: {self.failure}"
            raise ApiError(503, text, retry_after=5)
        call = Call(
            self.engine,
            self._bell,
            requests,
            each_piece=each_piece,
            seconds=self.limits.call_seconds,
            on_first=self.metrics.first_token.observe,
        )
        try:
            call.submit()
        except EngineFull as error:
            raise ApiError(429, str(error), code="full", retry_after=self.retry_after()) from None
        except UserError:
            for request in requests:
                self.adapter_of(request.adapter or self.base_name)
            raise
        self._calls.add(call)
        return call

    def leave(self, call: Call) -> None:
        """A call has ended, however it did."""
        self._calls.discard(call)
        self._heard_at = max(self._heard_at, call.heard_at)
        now = time.monotonic()
        self._ended.append(now)
        self.metrics.call_seconds.observe(now - call.started_at)

    def cut(self, cause: str = STOPPING) -> None:
        """End all calls with ``cause``; to be called in the event loop."""
        for call in list(self._calls):
            call.cancel()
            call.fail(ApiError(503, cause, code="cancelled", retry_after=5))

    @property
    def calls(self) -> int:
        """Calls in progress."""
        return len(self._calls)

    def retry_after(self) -> int:
        """Seconds until the queue is likely to have room: its length over the calls a second."""
        now = time.monotonic()
        recent = sum(ended > now - RATE_SECONDS for ended in self._ended)
        if not recent:
            return 1
        rate = recent / min(RATE_SECONDS, max(1.0, now - self._ended[0]))
        return max(1, min(LONGEST_RETRY, round(self.engine.stats().waiting / rate)))

    def illness(self) -> str:
        """Why the server should get no requests, empty where it is well."""
        if self.closing:
            return "stopping"
        if self.failure:
            return f"the engine failed: {self.failure}"
        if not self._calls:
            return ""
        oldest = min(call.started_at for call in self._calls)
        heard = max(self._heard_at, oldest, *(call.heard_at for call in self._calls))
        silent = time.monotonic() - heard
        if silent > self.limits.stuck_seconds:
            return f"no token for {silent:.0f} s with {self.calls} calls in progress"
        return ""
