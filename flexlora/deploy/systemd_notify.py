"""Tell systemd how a service is: sd_notify(3) as one datagram, and nothing where no one listens.

A unit of ``Type=notify`` hands its main process ``NOTIFY_SOCKET``; with ``WatchdogSec`` it expects
``WATCHDOG=1`` at least that often and restarts the service otherwise.
"""

from __future__ import annotations

import socket
from collections.abc import MutableMapping
from contextlib import suppress

__all__ = ["Notifier"]

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """Sends states to the socket that ``environment`` names.

    The variables are removed from ``environment``: the children of a service do not speak for it.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        named = [environment.pop(name, "") for name in VARIABLES]
        # "@" is how systemd spells the zero byte of an abstract socket.
        self._address = "\0" + named[0][1:] if named[0].startswith("@") else named[0]

    def send(self, *assignments: str) -> None:
        """For example ``send("READY=1", "STATUS=running")``."""
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.sendto("\n".join(assignments).encode(), self._address)
