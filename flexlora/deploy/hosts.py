"""Hosts, ports and paths as a person types them, checked before a key or a unit is made of them.

A path ends up in shell scripts, systemd units, nginx's and compose's files, which quote in four
different ways; so only such characters are taken as mean themselves in all of them.
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
    "parse_host",
    "parse_name",
    "parse_port",
    "parse_superlink",
    "plain",
]

LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
PLAIN = re.compile(r"[A-Za-z0-9_./+@=-]+")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,63}")
LONGEST = 253  # characters of a DNS name


@dataclass(frozen=True, kw_only=True)
class Host:
    """A DNS name, or an address; a certificate tells the two apart."""

    text: str
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine reaches it."""
        return self.address.is_loopback if self.address else self.text == "localhost"


@dataclass(frozen=True, kw_only=True)
class SuperLink:
    """Where a SuperLink, or the proxy before it, listens."""

    host: Host
    port: int

    def __str__(self) -> str:
        is_v6 = isinstance(self.host.address, ipaddress.IPv6Address)
        return f"[{self.host.text}]:{self.port}" if is_v6 else f"{self.host.text}:{self.port}"


def parse_host(text: str, flag: str) -> Host:
    """A DNS name or an IP address.

    Raises:
        UserError: neither of them; with a port, a scheme or a wildcard, it is neither.
    """
    try:
        address = ipaddress.ip_address(text)
        return Host(text=str(address), address=address)
    except ValueError:
        pass
    labels = text.split(".")
    # An all-numeric last label would be read as an address, and it is none (300.1.1.1).
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
    """``HOST:PORT``, or ``[::1]:PORT``.

    Raises:
        UserError: no port, or a host that is none.
    """
    name, _, port = text.rpartition(":")
    number = int(port) if port.isascii() and port.isdigit() else 0
    bare = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    if not bare or not 0 < number < 65536 or (":" in bare and bare == name):
        raise UserError(
            f"{flag} is '{text}', expected HOST:PORT such as 'fl.example.org:9092' or '[::1]:9092'."
        )
    return SuperLink(host=parse_host(bare, flag), port=number)


def parse_name(text: str, flag: str) -> str:
    """A name that a command line, a unit and a CSV file can carry as it is.

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
    """``path`` as text, if it means itself in every file that is made of it.

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
