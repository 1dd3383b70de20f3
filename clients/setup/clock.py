"""Compare this machine's clock with the server's: ``flexlora client clock``.

A SuperNode signs the time of each request, and Flower's messages expire by the wall clock: a
SuperLink refuses a node whose clock is ahead by more than 5 s or behind by more than 305 s, and its
log does not say why. The server's time is the ``Date`` header of its ``/health``, asked over the
connection that the SuperNode has (the same address and authority), and no other.

``check_clock`` asks once. The command asks before the SuperNode starts (exit status 1: it would be
refused), and with ``--watch`` for as long as the process lives that started it.
"""

from __future__ import annotations

import os
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Option

from flexlora.commands.options import PATH
from flexlora.deploy.certificates import AuthoritiesRefused, read_authorities
from flexlora.deploy.connections import HttpResponse, Stopped
from flexlora.deploy.doctor import Finding, failed, ok, warning
from flexlora.deploy.hosts import split_address
from flexlora.deploy.tls_checks import check_certificate, inspect_endpoint, unverified
from flexlora.errors import UserError
from flexlora.units import human_seconds

__all__ = [
    "check_clock",
    "clock",
    "clock_of_server",
    "compare_clocks",
    "default_trust",
    "watch_clock",
]

NAME = "clock"
REMEDY = "timedatectl set-ntp true (here or on the server)"
REPEAT_SECONDS = 600.0  # between two lines of a clock that stays wrong
PARENT_SECONDS = 1.0  # between two looks whether the process that started the watch lives


def check_clock(host: str, port: int, *, roots: Path | None = None) -> Finding:
    """One request to the server: ``failed`` where it would refuse what this clock signs.

    Args:
        roots: the authorities of its certificate; None: those of this machine, or plain HTTP.

    A server that does not answer, or whose certificate is not trusted, is a warning: the clocks
    cannot be compared.
    """
    try:
        return _compared(host, port, roots)
    except Stopped as stopped:
        cause = stopped.finding
        message = f"the clocks cannot be compared: {cause.message}"
        return warning(message, cause.remedy, name=NAME)
    except AuthoritiesRefused as error:
        return warning(f"the clocks cannot be compared: {error}", error.remedy, name=NAME)


def _compared(host: str, port: int, roots: Path | None) -> Finding:
    """The comparison over a trusted connection.

    A clock that is wrong by days makes every certificate look expired, or not yet valid: one that
    is refused is asked unverified, and counts where the clock explains the refusal.
    """
    authorities = read_authorities(roots) if roots else None
    link = inspect_endpoint(host, port)
    if link.certificate is not None:
        context = authorities.context() if authorities else default_trust()
        try:
            check_certificate(link, link.certificate, context, authorities)
        except Stopped:
            answer = replace(link, context=unverified()).ask("GET", "/health")
            seen = compare_clocks(link.address, answer)
            if seen.status == "failed":
                return seen
            raise
        link = replace(link, context=context)
    return compare_clocks(link.address, link.ask("GET", "/health"))


def default_trust() -> ssl.SSLContext:
    """The trust of a SuperNode without root certificates: that of Flower's HTTP client."""
    import httpx

    return httpx.create_ssl_context()


def compare_clocks(address: str, answer: HttpResponse) -> Finding:
    """This machine's clock against the server's, within the tolerance of node signatures.

    ``Date`` is a whole second and may be one old: the server's time was in [date, date + 2).
    """
    from flexlora.clients.setup.flower_private import SECONDS_AHEAD as FAST
    from flexlora.clients.setup.flower_private import SECONDS_BEHIND as SLOW

    if answer.date is None:
        message = f"{address} does not tell its time, so the clocks cannot be compared."
        return warning(message, "timedatectl (here and on the server)", name=NAME)
    least, most = answer.asked - (answer.date + 2), answer.came - answer.date
    off = (least + most) / 2
    limit = f"node authentication takes a clock {FAST} s ahead and {SLOW} s behind"
    side = "ahead of" if off > 0 else "behind"
    message = f"this machine's clock is {human_seconds(abs(off))} {side} the server's"
    if least > FAST or most < -SLOW:
        return failed(f"{message}; {limit}.", REMEDY, name=NAME)
    if most > FAST or least < -SLOW:
        return warning(f"{message}, near the limit: {limit}.", REMEDY, name=NAME)
    return ok(f"at most {max(abs(least), abs(most)):.1f} s off the server's; {limit}", name=NAME)


def clock(
    superlink: Annotated[str, Option(metavar="HOST:PORT", help="the server")],
    root_certificates: Annotated[
        str, Option(metavar="CA.crt", click_type=PATH, help="who signed its certificate")
    ] = "",
    watch: Annotated[
        float, Option(metavar="SECONDS", help="ask again as often, until the caller ends")
    ] = 0.0,
) -> int:
    """Print how far this machine's clock is off; 1 if the server would refuse the node for it.

    With ``--watch`` it prints what changes, and ends with the process that started it.

    Raises:
        UserError: a malformed address, seconds below 0.
    """
    if not watch >= 0:
        raise UserError(f"--watch is {watch:g}, expected 0 or more seconds.")
    split_address(superlink, "--superlink")
    if watch:
        parent = os.getppid()
        watch_clock(
            lambda: clock_of_server(superlink, root_certificates),
            seconds=watch,
            alive=lambda: os.getppid() == parent,
        )
        return 0
    finding = clock_of_server(superlink, root_certificates)
    _print(finding)
    return int(finding.status == "failed")


def clock_of_server(superlink: str, root_certificates: str) -> Finding:
    """``check_clock`` with a command line's values.

    Raises:
        UserError: a malformed address.
    """
    host, port = split_address(superlink, "--superlink")
    return check_clock(host, port, roots=Path(root_certificates) if root_certificates else None)


def watch_clock(check: Callable[[], Finding], *, seconds: float, alive: Callable[[], bool]) -> None:
    """Print a finding whenever its status changes, and again while it stays ``failed``."""
    before, printed = "ok", time.monotonic()
    while alive():
        finding, now = check(), time.monotonic()
        if finding.status != before or (
            finding.status == "failed" and now - printed >= REPEAT_SECONDS
        ):
            _print(finding)
            before, printed = finding.status, now
        while alive() and time.monotonic() - now < seconds:
            time.sleep(min(seconds, PARENT_SECONDS))


def _print(finding: Finding) -> None:
    """One line in the log of the process that started this one."""
    remedy = f" Remedy: {finding.remedy}" if finding.remedy else ""
    print(f"clock {finding.status}: {finding.message}{remedy}", file=sys.stderr, flush=True)
