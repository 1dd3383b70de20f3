"""The HTTP server of a service: its address, its thread, its end.

uvicorn runs in a second thread, so that the main thread keeps the signals.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from flexlora.errors import UserError
from flexlora.serving.api.guard import Guard
from flexlora.serving.api.service import Service

__all__ = ["Front", "bind", "hosts_of", "is_loopback"]

LOG = logging.getLogger(__name__)
CONNECTIONS = 1000  # open at once; beyond it uvicorn answers 503
# Of an idle connection: longer than clients keep theirs (httpx 5 s), or a request may meet its end.
IDLE_SECONDS = 75
CUT_SECONDS = 5.0  # for answers that were cut to reach their clients
HEADER_BYTES = 64 * 1024


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hosts_of(host: str) -> set[str]:
    """What a Host header of this machine's clients may name."""
    return {host.lower(), "localhost", "127.0.0.1", "::1"}


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket at the address, not listening yet; port 0 takes a free one.

    Raises:
        UserError: the port is in use or not allowed, the host is no address of this machine.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}, expected 0 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(_refusal(host, port, error)) from None
    return listening


def _refusal(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port is {port}, which another process listens on at {host}; give another one."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"--port is {port}, which needs rights to listen on; give one above 1023."
    return (
        f"--host is '{host}', which this machine cannot listen on ({error.strerror or error}); "
        "give one of its addresses, such as 127.0.0.1."
    )


class Front:
    """Serves ``app`` of ``service`` at a bound socket until ``stop``."""

    def __init__(
        self,
        service: Service,
        app: ASGIApp,
        listening: socket.socket,
        *,
        api_key: str = "",
        hosts: set[str] | None = None,
    ) -> None:
        self.service, self._socket = service, listening
        config = uvicorn.Config(
            Guard(app, api_key=api_key, hosts=hosts or (), count=service.metrics.count),
            http="h11",  # bounds the bytes of headers, which httptools does not
            ws="none",
            lifespan="on",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=IDLE_SECONDS,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        host, port = listening.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._socket])

        asyncio.run(serve())

    def start(self) -> None:
        """Listen; returns when clients can connect.

        Raises:
            UserError: another process has begun to listen there.
        """
        try:
            self._socket.listen()
        except OSError as error:
            host, port = self._socket.getsockname()[:2]
            raise UserError(_refusal(host, port, error)) from None
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the HTTP server did not start; its log has the cause")
            time.sleep(0.01)

    @property
    def alive(self) -> bool:
        """Whether calls are answered: neither the server nor the engine has ended by itself."""
        return self._thread.is_alive() and not self.service.failure

    def stop(self, grace_seconds: float, now: Callable[[], bool] = lambda: False) -> bool:
        """Refuse new calls, let those in progress end, cut them after ``grace_seconds``.

        They are cut at once when ``now()`` is true. True where none had to be cut and all threads
        have ended.
        """
        self._server.should_exit = True
        self._in_loop(self._close)
        deadline = time.monotonic() + grace_seconds
        while self._thread.is_alive() and time.monotonic() < deadline and not now():
            self._thread.join(0.05)
        calm = not self._thread.is_alive()
        if not calm:
            self._in_loop(self.service.cut)
            self._thread.join(CUT_SECONDS)
            self._server.force_exit = True  # clients that do not read
            self._thread.join(CUT_SECONDS)
        return self.service.end(CUT_SECONDS) and calm

    def _close(self) -> None:
        self.service.closing = True

    def _in_loop(self, function: Callable[[], None]) -> None:
        try:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # it has ended
            LOG.debug("the HTTP server has ended before it was stopped")
