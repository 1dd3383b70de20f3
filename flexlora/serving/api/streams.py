"""Server-sent events: the chunks of an answer as they come."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flexlora.serving.api.answers import Answers
from flexlora.serving.api.calls import Call, CallEnded
from flexlora.serving.api.errors import ApiError, error_body
from flexlora.serving.api.service import Service

__all__ = ["EventStream"]

DONE = b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return (
        b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


class EventStream(Response):
    """Sends what has arrived of ``call`` at once, so that a slow reader gets fewer, longer chunks.

    An error after the beginning is an event with OpenAI's error object, without ``[DONE]``.
    """

    media_type = "text/event-stream"

    def __init__(self, service: Service, call: Call, answers: Answers) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service, self._call, self._answers = service, call, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with self._call.while_connected(receive):
                await send(begin)
                await self._send_all(send)
        except CallEnded:
            return
        finally:
            self._service.leave(self._call)

    async def _send_all(self, send: Send) -> None:
        first = self._answers.first_chunks(len(self._call.requests))
        try:
            await self._send(send, first)
            async for batch in self._call.batches():
                await self._send(send, self._answers.chunks(batch))
            await self._send(send, self._answers.last_chunks(), DONE, more=False)
        except ApiError as error:
            body = error_body(error.status_code, error.detail, error.param, error.code)
            await self._send(send, [body], more=False)

    async def _send(
        self, send: Send, chunks: list[dict[str, Any]], end: bytes = b"", *, more: bool = True
    ) -> None:
        """Chunks as one message; a client that takes none for the length of a call is left.

        Raises:
            CallEnded: it is.
        """
        body = b"".join(map(_event, chunks)) + end
        if not body:
            return
        try:
            async with asyncio.timeout(self._service.limits.call_seconds):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except (TimeoutError, OSError):
            raise CallEnded from None
