"""One node's signed requests to a SuperLink's fleet API, as a SuperNode sends them.

Every request is a protobuf over HTTP/1.1 with the headers of Flower's ``NodeAuthHttpInterceptor``
and ``RuntimeVersionHttpInterceptor``. Two connections at most are kept alive, as many as a
SuperNode's two workers for objects use. The client is asyncio's streams and not httpx, so that a
thousand nodes on the machine of their server take little of its time. For the same reason a
signature is used for up to a second of requests, where a SuperNode signs each; the server checks
each one.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from base64 import b64encode
from collections import Counter
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from google.protobuf.message import Message as Proto

__all__ = ["FleetConnection", "FleetRefused"]

PATHS: dict[type[Proto], tuple[str, type[Proto]]] = {
    fleet_pb2.RegisterNodeFleetRequest: ("register-node", fleet_pb2.RegisterNodeFleetResponse),
    fleet_pb2.ActivateNodeRequest: ("activate-node", fleet_pb2.ActivateNodeResponse),
    fleet_pb2.DeactivateNodeRequest: ("deactivate-node", fleet_pb2.DeactivateNodeResponse),
    fleet_pb2.PullMessagesRequest: ("pull-messages", fleet_pb2.PullMessagesResponse),
    fleet_pb2.PushMessagesRequest: ("push-messages", fleet_pb2.PushMessagesResponse),
    heartbeat_pb2.SendNodeHeartbeatRequest: (
        "send-node-heartbeat",
        heartbeat_pb2.SendNodeHeartbeatResponse,
    ),
    message_pb2.PullObjectRequest: ("pull-object", message_pb2.PullObjectResponse),
    message_pb2.PushObjectRequest: ("push-object", message_pb2.PushObjectResponse),
    message_pb2.ConfirmMessageReceivedRequest: (
        "confirm-message-received",
        message_pb2.ConfirmMessageReceivedResponse,
    ),
    run_pb2.GetRunRequest: ("get-run", run_pb2.GetRunResponse),
    fab_pb2.GetFabRequest: ("get-fab", fab_pb2.GetFabResponse),
}
PARALLEL = 2  # FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS, and as many cores
SIGNED_SECONDS = 1.0
TIMEOUT = 30.0  # seconds, as in Flower's client
RETRIED = (502, 503, 504)  # Flower's client retries these and broken connections, nothing else
LONGEST_PAUSE = 20.0
HEADERS = "".join(
    f"{key}: {value}\r\n"
    for key, value in (
        ("Content-Type", "application/protobuf"),
        ("Accept", "application/protobuf"),
        *RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata(),
    )
)


class FleetRefused(Exception):
    """An answer other than 200 that Flower's client does not retry."""

    def __init__(self, call: str, status: int, text: str) -> None:
        super().__init__(f"{call}: HTTP {status}, {text[:300]}")
        self.call, self.status = call, status


class FleetConnection:
    """Ask the fleet API in the name of one key.

    Args:
        address: ``HOST:PORT`` of the SuperLink, or of what stands before it.
        tls: trusts the SuperLink's authority; None speaks plain HTTP.
    """

    def __init__(
        self, address: str, key: ec.EllipticCurvePrivateKey, tls: ssl.SSLContext | None = None
    ) -> None:
        self.address, self.tls, self._key = address, tls, key
        self.public_key = public_key_to_bytes(key.public_key())
        self.requests: Counter[str] = Counter()  # by call, each try counted
        self.bytes_sent = self.bytes_received = self.retries = 0
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._slots = asyncio.Semaphore(PARALLEL)
        self._signed_at, self._signed = -SIGNED_SECONDS, ""

    async def ask(self, request: Proto) -> Any:
        """The response to a request.

        Raises:
            FleetRefused: a status that Flower's client gives up at.
        """
        call, kind = PATHS[type(request)]
        body = request.SerializeToString(deterministic=True)
        pause = 1.0
        while True:
            self.requests[call] += 1
            try:
                async with self._slots, asyncio.timeout(TIMEOUT):
                    status, answer = await self._exchange(f"/v1/fleet/{call}", body)
            except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
                status, answer = 0, b""
            if status == 200:
                return kind.FromString(answer)
            if status and status not in RETRIED:
                raise FleetRefused(call, status, answer.decode(errors="replace"))
            self.retries += 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _exchange(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of one POST on a connection that is kept, or on a new one."""
        reader, writer = await self._stream()
        try:
            head = f"POST {path} HTTP/1.1\r\nHost: {self.address}\r\n{HEADERS}{self._signature()}"
            message = f"{head}Content-Length: {len(body)}\r\n\r\n".encode("ascii") + body
            writer.write(message)
            await writer.drain()
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in lines if line)
            answer = await reader.readexactly(int(fields["content-length"]))
        except BaseException:
            writer.close()
            raise
        self.bytes_sent += len(message)
        self.bytes_received += len(answer)
        if fields.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(first.split()[1]), answer

    async def _stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        host, _, port = self.address.rpartition(":")
        return await asyncio.open_connection(host, int(port), ssl=self.tls)

    def _signature(self) -> str:
        if time.monotonic() - self._signed_at >= SIGNED_SECONDS:
            self._signed_at, timestamp = time.monotonic(), now().isoformat()
            signed = b64encode(sign_message(self._key, timestamp.encode("ascii"))).decode("ascii")
            self._signed = (
                f"{FLEET_HTTP_PUBLIC_KEY_HEADER}: {b64encode(self.public_key).decode('ascii')}\r\n"
                f"{TIMESTAMP_HEADER}: {timestamp}\r\n{FLEET_HTTP_SIGNATURE_HEADER}: {signed}\r\n"
            )
        return self._signed

    def close(self) -> None:
        """Drop the connections that are kept."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()
