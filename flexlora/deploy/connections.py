"""Connections to one server that a person named: short, bounded, and to nobody else.

Proxies of the environment and redirects are not followed, and nothing is sent but the request that
the caller wrote. What a failed connection means is told in a sentence, for ``flexlora doctor``.
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

from flexlora.deploy.doctor import Finding, failed
from flexlora.errors import UserError

__all__ = [
    "SECONDS",
    "Answer",
    "Link",
    "Stopped",
    "ask",
    "connect",
    "is_own",
    "parse_address",
    "reason",
    "spelled",
]

SECONDS = 5.0  # for a connection, for a handshake and for each piece of an answer
LARGEST = 4 * 2**20  # bytes of an answer that are read


class Stopped(Exception):
    """Why nothing that comes after it can be found out."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.told)
        self.finding = finding


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An HTTP response; when, by this machine's clock, it was asked for and came.

    ``date`` is what the server's clock said, in seconds since 1970, None where it says nothing.
    """

    status: int
    body: bytes
    date: float | None
    asked: float
    came: float

    @property
    def code(self) -> int | None:
        """The number in an error that is told in JSON, as Flower's are."""
        try:
            told = json.loads(self.body)
        except ValueError:
            return None
        code = told.get("code") if isinstance(told, dict) else None
        return code if isinstance(code, int) else None


@dataclass(frozen=True, kw_only=True)
class Link:
    """A server that was reached: over TLS and trusted, or in the clear (no ``context``).

    ``own`` says that its address never leaves this machine.
    """

    host: str
    port: int
    context: ssl.SSLContext | None
    own: bool

    @property
    def address(self) -> str:
        return spelled(self.host, self.port)

    def get(self, path: str) -> Answer:
        return self._ask("GET", path, {}, b"")

    def post(self, path: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        return self._ask("POST", path, headers, body)

    def _ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        try:
            return ask(
                self.host, self.port, method, path, context=self.context, headers=headers, body=body
            )
        except (OSError, http.client.HTTPException) as error:
            told = f"{self.address} breaks off its answer to {method} {path}: {reason(error)}."
            remedy = f"ss -ltnp 'sport = :{self.port}' (on the server; its log says why)"
            raise Stopped(failed(told, remedy)) from None


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, or ``[::1]:PORT``.

    Raises:
        UserError: no host, a port that is none, an address with a scheme or a path, an IPv6 address
            without brackets.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--superlink is '{text}', expected HOST:PORT such as '10.0.0.1:8000'.")
    if "/" in host:
        bare = host.rpartition("/")[2] or "HOST"
        raise UserError(f"--superlink is '{text}', expected HOST:PORT; try '{bare}:{port}'.")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise UserError(
            f"--superlink is '{text}', expected brackets around an IPv6 address: '[{host}]:{port}'."
        )
    return (host[1:-1] if bracketed else host), int(port)


def spelled(host: str, port: int) -> str:
    """``HOST:PORT`` as a person writes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reason(error: BaseException) -> str:
    """The short part of what the system says."""
    told = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return str(told or type(error).__name__).splitlines()[0].rstrip(".")


def connect(host: str, port: int) -> socket.socket:
    """A TCP connection.

    Raises:
        Stopped: why there is none.
    """
    address = spelled(host, port)
    try:
        return socket.create_connection((host, port), timeout=SECONDS)
    except (socket.gaierror, UnicodeError) as error:
        told = f"the name '{host}' cannot be resolved here: {reason(error)}."
        remedy = f"getent hosts {host}"
    except ConnectionRefusedError:
        told = f"{address} refuses connections: the machine is there, and nothing listens there."
        remedy = (
            f"ss -ltn 'sport = :{port}' (on the server: does its SuperLink run with this --port?)"
        )
    except TimeoutError:
        told = (
            f"{address} does not answer within {SECONDS:g} s: a firewall is between, or it is off."
        )
        remedy = f"nc -vz -w 5 {host} {port} (once the server's firewall lets the port through)"
    except OSError as error:
        told, remedy = f"{address} cannot be reached: {reason(error)}.", f"ip route get {host}"
    raise Stopped(failed(told, remedy))


def is_own(address: str) -> bool:
    """Whether an IP address never leaves this machine."""
    ip = ip_address(address.partition("%")[0])
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def ask(
    host: str,
    port: int,
    method: str,
    path: str,
    *,
    context: ssl.SSLContext | None,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
) -> Answer:
    """One request over TLS, or in the clear where ``context`` is None.

    Raises:
        OSError, http.client.HTTPException: there is no answer, or it is none of HTTP's.
    """
    if context is None:
        made = http.client.HTTPConnection(host, port, timeout=SECONDS)
    else:
        made = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=context)
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
    return Answer(status=response.status, body=content, date=date, asked=asked, came=came)


def _seconds(date: str | None) -> float | None:
    """An HTTP date in seconds since 1970."""
    try:
        return parsedate_to_datetime(date).timestamp() if date else None
    except (ValueError, OverflowError):
        return None
