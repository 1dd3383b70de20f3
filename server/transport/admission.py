"""Answer the nodes that a SuperLink can serve now, and have the others come again.

A SuperLink works on one core, some 10 ms a request. A thousand nodes that ask at once wait 10 s and
more; beyond 30 s Flower's client asks again, while its first request is still served: measured with
1,000 nodes, 29,445 requests were repeated in 20 minutes and no round began. So requests beyond a
number that is answered within a second get a 503 before any work is done. Flower's client tries
again after 1 to 20 s, the longer the more often it was turned away. Polls are turned away first: a
node that has its message finishes before another begins.

Few of those let in are worked on at once: each takes a thread and a connection to the database, of
which SQLAlchemy keeps five, and threads that wait for one interpreter only hinder each other. A
request waits for its turn with its whole body, and gives its turn back with its whole answer, so
that no slow link holds one. Flower's layers then pass a body on once, not in pieces of 64 KB.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

__all__ = ["MOST_AT_ONCE", "MOST_BYTES", "MOST_OPEN", "MOST_OPEN_POLLS", "limit_open_requests"]

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Serve = Callable[[Scope, Receive, Send], Awaitable[None]]

FLEET, POLL = "/v1/fleet/", "/v1/fleet/pull-messages"
MOST_OPEN, MOST_OPEN_POLLS = 64, 24  # a poll is let in only while fewer requests are open
MOST_AT_ONCE = 4
MOST_BYTES = 8 * 2**20  # of a body, as in the proxy's configuration; Flower's objects have 5 MiB


def limit_open_requests(kind: Any) -> None:
    """Have ``kind``, a class of ASGI applications, turn nodes' requests away beyond the limits."""
    serve = kind.__call__
    open_requests = 0
    turn = asyncio.Semaphore(MOST_AT_ONCE)

    async def call(self: Any, scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal open_requests
        if scope["type"] != "http" or not scope["path"].startswith(FLEET):
            await serve(self, scope, receive, send)
            return
        if open_requests >= (MOST_OPEN_POLLS if scope["path"] == POLL else MOST_OPEN):
            await _turn_away(receive, send, 503)
            return
        open_requests += 1
        try:
            await _serve_whole(partial(serve, self), scope, receive, send, turn)
        finally:
            open_requests -= 1

    kind.__call__ = call


async def _serve_whole(
    serve: Serve, scope: Scope, receive: Receive, send: Send, turn: asyncio.Semaphore
) -> None:
    """Read the body, serve the request in its turn, send the answer."""
    parts, size, more = [], 0, True
    while more and size <= MOST_BYTES:
        event = await receive()
        if event["type"] != "http.request":
            return  # the client has hung up
        parts.append(event.get("body", b""))
        size, more = size + len(parts[-1]), event.get("more_body", False)
    if size > MOST_BYTES:
        await _turn_away(receive, send, 413, more)
        return
    body: Event | None = {"type": "http.request", "body": b"".join(parts), "more_body": False}
    answer: list[Event] = []

    async def replay() -> Event:
        nonlocal body
        event, body = body, None
        return event if event is not None else await receive()

    async def keep(event: Event) -> None:
        answer.append(event)

    async with turn:
        await serve(scope, replay, keep)
    for event in answer[:1]:
        await send(event)
    content = b"".join(event.get("body", b"") for event in answer[1:])
    await send({"type": "http.response.body", "body": content})


async def _turn_away(receive: Receive, send: Send, status: int, more: bool = True) -> None:
    """The status once the body has been read, so that the connection can be used again."""
    while more and (event := await receive())["type"] == "http.request":
        more = event.get("more_body", False)
    headers = [(b"content-length", b"0"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
