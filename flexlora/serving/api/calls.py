"""From the engine's thread to the event loop: the requests of one HTTP call, and their pieces."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol

from flexlora.serving.api.errors import ApiError
from flexlora.serving.requests import Piece, Request

__all__ = ["Bell", "Call", "CallEnded", "Submitting"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Submitting(Protocol):
    """What a call needs of the engine."""

    def submit(self, request: Request, on_piece: Callable[[Piece], None]) -> None: ...
    def cancel(self, request_id: str) -> None: ...


class CallEnded(Exception):
    """The client has hung up: nobody reads an answer."""


class Bell:
    """Sets events of an event loop from another thread, many with one wake-up of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._rung: deque[asyncio.Event] = deque()
        self._scheduled = False

    def ring(self, event: asyncio.Event) -> None:
        """Set ``event`` soon.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._rung.append(event)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._set_all)

    def _set_all(self) -> None:
        self._scheduled = False  # before the deque is emptied: a later ring schedules again
        while self._rung:
            self._rung.popleft().set()


class Call:
    """The requests of one HTTP call: submitted together, and cancelled together.

    ``each_piece``: wake the reader for every piece, not only when all requests have ended.
    ``on_first`` is called with the seconds to the first token of every request, in the engine's
    thread.
    """

    def __init__(
        self,
        engine: Submitting,
        bell: Bell,
        requests: Sequence[Request],
        *,
        each_piece: bool,
        seconds: float,
        on_first: Callable[[float], None],
    ) -> None:
        self._engine, self._bell, self.requests = engine, bell, requests
        self._each_piece, self._on_first = each_piece, on_first
        self._arrived: deque[tuple[int, Piece]] = deque()
        self._event = asyncio.Event()
        self._open = set(range(len(requests)))  # requests whose last piece has not arrived
        self._silent = set(self._open)
        self._error: Exception | None = None
        self.started_at = self.heard_at = time.monotonic()
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._seconds = seconds

    def submit(self) -> None:
        """Hand all requests to the engine, or none of them.

        Raises:
            EngineFull, UserError: as ``Engine.submit``.
        """
        try:
            for index, request in enumerate(self.requests):
                self._engine.submit(request, partial(self._on_piece, index))
        except Exception:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give back the places of the requests that have not ended."""
        for index in list(self._open):
            self._engine.cancel(self.requests[index].request_id)

    def fail(self, error: Exception) -> None:
        """End the call: its reader gets ``error``. To be called in the event loop."""
        self._error = self._error or error
        self._event.set()

    def _on_piece(self, index: int, piece: Piece) -> None:
        """In the engine's thread."""
        self.heard_at = time.monotonic()
        if index in self._silent and piece.token_ids:
            self._silent.discard(index)
            self._on_first(self.heard_at - self.started_at)
        if piece.finish_reason is not None:
            self._open.discard(index)
        self._arrived.append((index, piece))
        if self._each_piece or not self._open:
            self._bell.ring(self._event)

    async def batches(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """The pieces that have arrived since the last batch, until all requests have ended.

        Raises:
            ApiError: the time is over, the engine has failed or cancelled a request.
            CallEnded: the client has hung up.
        """
        left = len(self.requests)
        while left:
            await self._wait()
            self._event.clear()
            if self._error is not None:
                raise self._error
            batch = [self._arrived.popleft() for _ in range(len(self._arrived))]
            for _, piece in batch:
                left -= piece.finish_reason is not None
                _refuse_broken(piece)
            yield batch

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._event.wait()
        except TimeoutError:
            text = f"the answer was not ready within {self._seconds:g} s; ask for fewer tokens."
            raise ApiError(504, text, code="timeout") from None

    @asynccontextmanager
    async def while_connected(self, receive: Receive) -> AsyncIterator[None]:
        """Cancel what has not ended, when the block ends or the client hangs up."""
        watch = asyncio.create_task(self._hung_up(receive))
        try:
            yield
        finally:
            watch.cancel()
            self.cancel()

    async def _hung_up(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cancel()
        self.fail(CallEnded())


def _refuse_broken(piece: Piece) -> None:
    if piece.finish_reason == "error":
        raise ApiError(500, f"the engine failed: {piece.error or 'no cause given'}")
    if piece.finish_reason == "cancelled":
        raise ApiError(503, "the server is stopping.", code="cancelled", retry_after=5)
