"""What a request must pass before it is read: host, key, content type, size and time of its body.

Pure ASGI: the body is read here, whole and bounded, and handed on; ``receive`` then tells the
application when the client hangs up.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexlora.serving.api.errors import ApiError, error_response

__all__ = ["HUNG_UP", "MAX_BODY", "Guard"]

MAX_BODY = 4 * 2**20
DRAINED = 16  # times the bound is read and dropped, so that a client sees why it is refused
BODY_SECONDS = 30.0
HUNG_UP = 499  # nginx's status for a client that is gone: nobody reads it
OPEN = ("/health",)  # without a key: who restarts a server asks it


class _HungUp(Exception):
    pass


class Guard:
    """Refuses requests in OpenAI's shape before ``app`` sees them.

    Args:
        api_key: what ``Authorization: Bearer`` must name; empty: no key.
        hosts: what a ``Host`` header may name, without its port; empty: anything. On loopback
            without a key it keeps out web pages whose name was pointed to this machine
            (DNS rebinding).
        max_body: bytes of a body.
        count: called with the path and the outcome of every call: an HTTP status, or ``hung_up``.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str = "",
        hosts: Collection[str] = (),
        max_body: int = MAX_BODY,
        body_seconds: float = BODY_SECONDS,
        count: Callable[[str, str], None] = lambda path, outcome: None,
    ) -> None:
        self.app, self._key, self._hosts = app, api_key.encode(), frozenset(hosts)
        self._max_body, self._body_seconds, self._count = max_body, body_seconds, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        outcome = _Outcome(send)
        try:
            await self._guarded(scope, receive, outcome)
        finally:
            self._count(scope["path"], outcome.name)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope, Headers(scope=scope))
            body = await self._body(Headers(scope=scope), receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        except _HungUp:
            return
        else:
            await self.app(scope, _again(body, receive), send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = _host(headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            listed = ", ".join(sorted(self._hosts))
            text = f"the Host header names '{host}', expected one of {listed}."
            raise ApiError(403, text)
        if self._key and scope["path"] not in OPEN:
            given = headers.get("authorization", "")
            kind, _, key = given.partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key):
                text = "no valid key: expected the header 'Authorization: Bearer KEY'."
                raise ApiError(401, text, code="invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise ApiError(415, f"the content type is '{kind}', expected application/json.")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            ApiError: too many bytes, or they took too long.
        """
        try:
            async with asyncio.timeout(self._body_seconds):
                return await self._read(receive)
        except TimeoutError:
            text = f"the body did not arrive within {self._body_seconds:g} s."
            raise ApiError(408, text) from None

    async def _read(self, receive: Receive) -> bytes:
        parts, size = list[bytes](), 0
        while size <= DRAINED * self._max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _HungUp
            part = message.get("body", b"")
            size += len(part)
            if size <= self._max_body:
                parts.append(part)
            if not message.get("more_body", False):
                break
        if size > self._max_body:
            text = f"the body has more than {self._max_body} bytes, which is the bound."
            raise ApiError(413, text)
        return b"".join(parts)


class _Outcome:
    """Passes messages on to ``send`` and notes whether the response was whole."""

    def __init__(self, send: Send) -> None:
        self._send, self._status, self._whole = send, HUNG_UP, False

    async def __call__(self, message: Message) -> None:
        self._status = message.get("status", self._status)
        self._whole = not message.get("more_body", message["type"] == "http.response.start")
        await self._send(message)

    @property
    def name(self) -> str:
        return str(self._status) if self._whole and self._status != HUNG_UP else "hung_up"


def _host(header: str) -> str:
    """The name without its port: ``[::1]:8000`` is ``::1``."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def _again(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives ``body`` first and then what comes."""
    given: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return given.pop() if given else await receive()

    return next_message
