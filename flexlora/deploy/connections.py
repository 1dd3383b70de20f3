"""HTTP and TLS requests to one server, for ``flexlora doctor``.

Bounded in time and size. Proxies of the environment and redirects are not followed. A failed
connection becomes a finding that says what it means.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from ipaddress import ip_address

from cryptography import x509

from flexlora.deploy.doctor import Finding, failed
from flexlora.deploy.hosts import join_address

__all__ = [
    "SECONDS",
    "HttpResponse",
    "Link",
    "Stopped",
    "is_loopback",
    "reason",
]

SECONDS = 5.0  # for a connection, for a handshake and for each read
LARGEST = 4 * 2**20  # bytes of a response that are read


class Stopped(Exception):
    """A finding after which no further check of the server can run."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


@dataclass(frozen=True, kw_only=True)
class HttpResponse:
    """Times are in seconds since 1970; ``asked`` and ``came`` by this machine's clock.

    ``date`` is the server's clock, None if it does not send it.
    """

    status: int
    body: bytes
    date: float | None
    asked: float
    came: float

    @property
    def code(self) -> int | None:
        """The error code in a JSON body, as in Flower's errors."""
        try:
            body = json.loads(self.body)
        except ValueError:
            return None
        code = body.get("code") if isinstance(body, dict) else None
        return code if isinstance(code, int) else None


@dataclass(frozen=True, kw_only=True)
class Link:
    """A server: over TLS trusted by ``context``, or over plain HTTP without one.

    ``certificate`` is what it showed in an unverified handshake, None if it speaks plain HTTP.
    """

    host: str
    port: int
    is_loopback: bool = False
    certificate: x509.Certificate | None = None
    context: ssl.SSLContext | None = None

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)

    def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> HttpResponse:
        """``request``, where no response stops the checks."""
        try:
            return self.request(method, path, headers, body)
        except (OSError, http.client.HTTPException) as error:
            cause = reason(error)
            message = f"{self.address} breaks off its answer to {method} {path}: {cause}."
            remedy = f"ss -ltnp 'sport = :{self.port}' (on the server; its log says why)"
            raise Stopped(failed(message, remedy)) from None

    def request(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> HttpResponse:
        """One request over a connection of its own.

        Raises:
            OSError, http.client.HTTPException: no response, or one that is not HTTP.
        """
        if self.context is None:
            made = http.client.HTTPConnection(self.host, self.port, timeout=SECONDS)
        else:
            made = http.client.HTTPSConnection(
                self.host, self.port, timeout=SECONDS, context=self.context
            )
        try:
            made.connect()
            asked = time.time()
            made.request(method, path, body=body, headers=dict(headers or {}))
            response = made.getresponse()
            came = time.time()
            date = _seconds(response.getheader("Date"))
            content = response.read(LARGEST)
        finally:
            made.close()
        return HttpResponse(status=response.status, body=content, date=date, asked=asked, came=came)

    def connect(self) -> socket.socket:
        """A TCP connection.

        Raises:
            Stopped: with the cause.
        """
        try:
            return socket.create_connection((self.host, self.port), timeout=SECONDS)
        except (OSError, UnicodeError) as error:
            raise Stopped(failed(*_unreachable(self, error))) from None


def _unreachable(link: Link, error: Exception) -> tuple[str, str]:
    """What a failed connection means, and a remedy."""
    address, host, port = link.address, link.host, link.port
    if isinstance(error, socket.gaierror | UnicodeError):
        message = f"the name '{host}' cannot be resolved here: {reason(error)}."
        return message, f"getent hosts {host}"
    if isinstance(error, ConnectionRefusedError):
        message = f"{address} refuses connections: the machine is there, and nothing listens there."
        where = "on the server: does its SuperLink run with this --port?"
        return message, f"ss -ltn 'sport = :{port}' ({where})"
    if isinstance(error, TimeoutError):
        causes = "a firewall is between, or it is off"
        message = f"{address} does not answer within {SECONDS:g} s: {causes}."
        return (
            message,
            f"nc -vz -w 5 {host} {port} (once the server's firewall lets the port through)",
        )
    return f"{address} cannot be reached: {reason(error)}.", f"ip route get {host}"


def reason(error: BaseException) -> str:
    """The first line of a system error, without codes."""
    text = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return str(text or type(error).__name__).splitlines()[0].rstrip(".")


def is_loopback(address: str) -> bool:
    """Whether an IP address never leaves this machine."""
    ip = ip_address(address.partition("%")[0])
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _seconds(date: str | None) -> float | None:
    """An HTTP date in seconds since 1970."""
    try:
        return parsedate_to_datetime(date).timestamp() if date else None
    except (ValueError, OverflowError):
        return None
