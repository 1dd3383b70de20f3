"""Parse hosts, ports, names and paths that a person types.

Paths end up in shell scripts, systemd units, nginx's and compose's files, which quote in four
different ways; only characters that need no quotes in any of them are accepted.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from flexlora.errors import UserError

__all__ = [
    "Host",
    "SuperLink",
    "join_address",
    "parse_host",
    "parse_name",
    "parse_port",
    "parse_superlink",
    "plain",
    "split_address",
]

LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
PLAIN = re.compile(r"[A-Za-z0-9_./+@=-]+")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,63}")
LONGEST = 253  # characters of a DNS name


@dataclass(frozen=True, kw_only=True)
class Host:
    """A DNS name, or an IP address; certificates distinguish the two."""

    text: str
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.address.is_loopback if self.address else self.text == "localhost"


@dataclass(frozen=True, kw_only=True)
class SuperLink:
    """Where a SuperLink, or the proxy before it, listens."""

    host: Host
    port: int

    def __str__(self) -> str:
        return join_address(self.host.text, self.port)


def parse_host(text: str, flag: str) -> Host:
    """A DNS name or an IP address.

    Raises:
        UserError: neither of them, or one with a port, a scheme or a wildcard.
    """
    try:
        address = ipaddress.ip_address(text)
        return Host(text=str(address), address=address)
    except ValueError:
        pass
    labels = text.split(".")
    # A numeric last label would be read as an address (300.1.1.1).
    fits = len(text) <= LONGEST and all(map(LABEL.fullmatch, labels)) and not labels[-1].isdigit()
    if not fits:
        raise UserError(
            f"{flag} is '{text}', expected a DNS name such as 'fl.example.org' or an IP address, "
            "without scheme, port or wildcard."
        )
    return Host(text=text.lower())


def parse_port(port: int, flag: str) -> int:
    """A port that a user who is not root may listen on.

    Raises:
        UserError: outside 1024 to 65535.
    """
    if not 1024 <= port <= 65535:
        raise UserError(f"{flag} is {port}, expected a port from 1024 to 65535; 9092 is usual.")
    return port


def parse_superlink(text: str, flag: str) -> SuperLink:
    """``split_address`` with a host that ``parse_host`` accepts."""
    host, port = split_address(text, flag)
    return SuperLink(host=parse_host(host, flag), port=port)


def split_address(text: str, flag: str) -> tuple[str, int]:
    """``HOST:PORT``, or ``[::1]:PORT``, as host (without brackets) and port.

    Raises:
        UserError: no host, no port from 1 to 65535, an address with a scheme or a path, an IPv6
            address without brackets.
    """
    host, _, port = text.rpartition(":")
    expected = f"{flag} is '{text}', expected HOST:PORT"
    if host in ("", "[]") or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"{expected} such as 'fl.example.org:9092' or '[::1]:9092'.")
    if "/" in host:
        raise UserError(f"{expected}; try '{host.rpartition('/')[2] or 'HOST'}:{port}'.")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise UserError(f"{expected} with brackets around an IPv6 address: '[{host}]:{port}'.")
    return (host[1:-1] if bracketed else host), int(port)


def join_address(host: str, port: int) -> str:
    """``HOST:PORT``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_name(text: str, flag: str) -> str:
    """A name that needs no quotes in a command line, a unit and a CSV file.

    Raises:
        UserError: other characters, or more than 64.
    """
    if not NAME.fullmatch(text):
        raise UserError(
            f"{flag} is '{text}', expected up to 64 letters, digits and ._@+- that begin with a "
            "letter or a digit, such as 'site-a'."
        )
    return text


def plain(path: str | Path, what: str) -> str:
    """``path`` as text, if it needs no quotes in any file that init writes.

    Raises:
        UserError: spaces, quotes, colons, dollar or percent signs and the like.
    """
    text = str(path)
    if not PLAIN.fullmatch(text):
        raise UserError(
            f"{what} is '{text}', expected a path of letters, digits and ._/+@=- alone, since "
            "scripts, units and proxies quote the rest differently; give it another name."
        )
    return text
