"""Answer the nodes that a SuperLink can serve now, and have the others come again.

A SuperLink works on one core, some 10 ms a request. A thousand nodes that ask at once wait 10 s and
more; beyond 30 s Flower's client asks again, while its first request is still served: measured with
1,000 nodes, 29,445 requests were repeated in 20 minutes and no round began. So requests beyond a
number that is answered within a second get a 503 before any work is done. Flower's client tries
again after 1 to 20 s, the longer the more often it was turned away.

Polls are turned away first: a node that has its message finishes before another begins.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["MOST_OPEN", "limit_open_requests"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

FLEET, POLL = "/v1/fleet/", "/v1/fleet/pull-messages"
MOST_OPEN, MOST_OPEN_POLLS = 64, 24  # a poll is let in only while fewer requests are open


def limit_open_requests(kind: Any) -> None:
    """Have ``kind``, a class of ASGI applications, turn nodes' requests away beyond the limits."""
    serve = kind.__call__
    open_requests = 0

    async def call(self: Any, scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal open_requests
        if scope["type"] != "http" or not scope["path"].startswith(FLEET):
            await serve(self, scope, receive, send)
            return
        if open_requests >= (MOST_OPEN_POLLS if scope["path"] == POLL else MOST_OPEN):
            await _turn_away(receive, send)
            return
        open_requests += 1
        try:
            await serve(self, scope, receive, send)
        finally:
            open_requests -= 1

    kind.__call__ = call


async def _turn_away(receive: Receive, send: Send) -> None:
    """A 503 once the body has been read, so that the connection can be used again."""
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass
    headers = [(b"content-length", b"0"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
