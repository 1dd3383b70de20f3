"""A slow link: a relay on loopback that delays what passes and lets so many bytes a second through.

One relay is one node's line: both directions have the rate for themselves, all connections of the
node share it. Bytes arrive ``delay_seconds`` after they have passed the rate, so a request and its
answer take two delays and their bytes. A TCP connection itself is accepted without delay.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress

__all__ = ["SlowLink"]

CHUNK = 16 * 1024
START_SECONDS = 10.0


class Rate:
    """When the next bytes will have passed a line of ``bytes_per_second`` (0: at once)."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second, self._free_at = bytes_per_second, 0.0

    def passed(self, size: int) -> float:
        """The moment at which ``size`` more bytes have passed, by ``time.monotonic``."""
        seconds = size / self.bytes_per_second if self.bytes_per_second else 0.0
        self._free_at = max(self._free_at, time.monotonic()) + seconds
        return self._free_at


class SlowLink:
    """Relays ``address`` (``HOST:PORT``) in a thread of its own while the block lasts."""

    def __init__(self, address: str, delay_seconds: float, bytes_per_second: float) -> None:
        self._target, self.delay_seconds = address, delay_seconds
        self._rates = Rate(bytes_per_second), Rate(bytes_per_second)
        self.bytes_up = self.bytes_down = 0
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._listens, self._ended = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> SlowLink:
        self._thread.start()
        if not self._listens.wait(START_SECONDS):
            raise RuntimeError("the relay does not listen, expected a free port of loopback.")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def _work(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.address = "{}:{}".format(*server.sockets[0].getsockname())
        self._listens.set()
        await self._ended.wait()
        server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.rpartition(":")
        try:
            back, there = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            self._pass(reader, there, self._rates[0], "bytes_up"),
            self._pass(back, writer, self._rates[1], "bytes_down"),
        )

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rate: Rate, count: str
    ) -> None:
        """One direction; what comes is read while what came before is still on its way."""
        on_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)
        arriving = asyncio.create_task(self._arrive(on_way, writer))
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                setattr(self, count, getattr(self, count) + len(chunk))
                await on_way.put((rate.passed(len(chunk)) + self.delay_seconds, chunk))
        await on_way.put((time.monotonic() + self.delay_seconds, b""))
        await arriving

    async def _arrive(
        self, on_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        broken = False
        while True:
            due, chunk = await on_way.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if not chunk:
                writer.close()
                return
            if not broken:
                writer.write(chunk)
                try:
                    await writer.drain()
                except OSError:
                    broken = True
