"""The part of ``flexlora doctor`` that an edge node needs: its SuperLink and its resident trainer.

Flower's SuperLink serves protobuf over HTTP(S) on one port: ``/v1/fleet/*`` for nodes,
``/v1/control/*`` for whoever submits code, ``/health``. No question here changes anything there: a
request of a wrong content type is refused by the protobuf layer before any handler (on the control
path after the login, where there is one), and the refusal is Flower's own.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import flexlora
from flexlora.clients.setup.node_key_checks import check_node_key
from flexlora.deploy.connections import Answer, Link, Stopped, parse_address
from flexlora.deploy.doctor import Check, Finding, failed, ok, warning
from flexlora.deploy.tls_checks import Shown, check_certificate, look, read_authorities
from flexlora.errors import UserError
from flexlora.units import human_seconds

__all__ = ["check_superlink", "check_trainer", "node_checks"]

WRONG_TYPE = 1002  # Flower's code for a refused content type
NO_SERVER = (502, 503, 504)  # what a proxy answers by itself
WRONG = {"Content-Type": "text/plain"}


def node_checks(
    superlinks: Sequence[str], root_certificates: str, node_key: str, trainer_socket: str
) -> list[Check]:
    """What was asked for on the command line, nothing tried yet.

    Raises:
        UserError: an address that is none, a flag that goes with a SuperLink and has none.
    """
    for flag, given in (("--root-certificates", root_certificates), ("--node-key", node_key)):
        if given and not superlinks:
            raise UserError(
                f"{flag} is '{given}' and no SuperLink is named; give --superlink HOST:PORT too."
            )
    roots = Path(root_certificates) if root_certificates else None
    key = Path(node_key) if node_key else None
    checks: list[Check] = []
    for address in superlinks:
        host, port = parse_address(address)
        checks.append(("superlink", partial(check_superlink, host, port, roots=roots, key=key)))
    if trainer_socket:
        checks.append(("trainer", partial(check_trainer, Path(trainer_socket))))
    return checks


def check_superlink(
    host: str, port: int, *, roots: Path | None = None, key: Path | None = None
) -> list[Finding]:
    """From the name to the node's key, as far as each step allows the next."""
    found: list[Finding] = []
    try:
        for finding in _steps(host, port, roots, key):
            found.append(finding)
    except Stopped as stopped:
        found.append(stopped.finding)
    return found


def _steps(host: str, port: int, roots: Path | None, key: Path | None) -> Iterator[Finding]:
    shown = look(host, port)
    yield from _proxied(host, shown)
    link = Link(host=host, port=port, context=None, own=shown.own)
    if shown.certificate is None:
        yield from _in_the_clear(link, roots)
    else:
        authorities = read_authorities(roots) if roots else None
        context = authorities.context() if authorities else _by_itself()
        yield check_certificate(host, port, shown.certificate, context, authorities)
        link = Link(host=host, port=port, context=context, own=shown.own)
    health = link.get("/health")
    yield _is_superlink(link, health)
    yield _clock(link, health)
    yield _control(link)
    if key is not None:
        yield check_node_key(link, key)


def _by_itself() -> ssl.SSLContext:
    """Whom a SuperNode trusts that is given no root certificates: Flower's HTTP client says."""
    import httpx

    return httpx.create_ssl_context()


def _proxied(host: str, shown: Shown) -> Iterator[Finding]:
    """Flower's HTTP client goes through the environment's proxy, these checks do not."""
    scheme = "http" if shown.certificate is None else "https"
    proxies = getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    if proxy and not proxy_bypass(host):
        where = urlsplit(proxy if "://" in proxy else f"//{proxy}").hostname
        told = (
            f"{scheme.upper()}_PROXY would take Flower's connections to {host} through '{where}'; "
            "these checks went there directly."
        )
        yield warning(told, f"export NO_PROXY={host}", name="proxy")


def _in_the_clear(link: Link, roots: Path | None) -> Iterator[Finding]:
    serve = "flower-superlink --ssl-certfile ... --ssl-keyfile ... --ssl-ca-certfile ..."
    if roots is not None:
        told = f"{link.address} speaks plain HTTP, and root certificates were given for TLS."
        raise Stopped(failed(told, f"{serve} (in place of --insecure)", name="certificate"))
    if not link.own:
        told = (
            f"{link.address} speaks plain HTTP: whoever is between can read and change what nodes "
            "and server send."
        )
        yield warning(told, f"{serve} (flexlora server init makes them)", name="certificate")


def _is_superlink(link: Link, health: Answer) -> Finding:
    """Whether Flower answers, and which: a proxy hides the version, and need not tell it.

    Raises:
        Stopped: something else does.
    """
    fleet = link.post("/v1/fleet/activate-node", WRONG)
    spoken = "TLS" if link.context else "plain HTTP"
    if health.status in NO_SERVER or fleet.status in NO_SERVER:
        told = f"{link.address} is a proxy that does not reach its SuperLink ({fleet.status})."
        raise Stopped(failed(told, "flower-superlink ... (does it run, behind the proxy?)"))
    if fleet.code != WRONG_TYPE:
        told = (
            f"{link.address} takes connections and does not answer as a SuperLink does over "
            f"{spoken} (/health: status {health.status}, nodes' path: {fleet.status})."
        )
        raise Stopped(failed(told, "flower-superlink --help (is this its --host and --port?)"))
    version, own = _version(link), metadata.version("flwr")
    if not version:
        return ok(f"{link.address} is a SuperLink over {spoken}; its version does not show")
    if version.split(".")[:2] != own.split(".")[:2]:
        told = f"{link.address} is a SuperLink of Flower {version}, this machine has {own}."
        return warning(told, f"pip install 'flwr=={own}' (on the server)")
    return ok(f"{link.address} is a SuperLink of Flower {version} over {spoken}")


def _version(link: Link) -> str:
    """What the SuperLink says of its own interface, "" where a proxy keeps that to itself."""
    try:
        told = json.loads(link.get("/openapi.json").body)["info"]
        return str(told["version"])[:20] if told["title"] == "SuperLink API" else ""
    except (ValueError, KeyError, TypeError):
        return ""


def _clock(link: Link, answer: Answer) -> Finding:
    """This clock against the server's, within what a node's signature may be off.

    ``Date`` is a whole second and may be one old: the server's time was in [date, date + 2).
    """
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    name, remedy = "clock", "timedatectl set-ntp true (here or on the server)"
    if answer.date is None:
        told = f"{link.address} does not tell its time, so the clocks cannot be compared."
        return warning(told, "timedatectl (here and on the server)", name=name)
    least, most = answer.asked - (answer.date + 2), answer.came - answer.date
    fast, slow = SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
    off = (least + most) / 2
    limit = f"node authentication takes a clock {fast} s ahead and {slow} s behind"
    side = "ahead of" if off > 0 else "behind"
    told = f"this machine's clock is {human_seconds(abs(off))} {side} the server's"
    if least > fast or most < -slow:
        return failed(f"{told}; {limit}.", remedy, name=name)
    if most > fast or least < -slow:
        return warning(f"{told}, near the limit: {limit}.", remedy, name=name)
    return ok(f"at most {max(abs(least), abs(most)):.1f} s off the server's; {limit}", name=name)


def _control(link: Link) -> Finding:
    """Whether code can be submitted from here; the request itself is refused in any case."""
    name = "control path"
    answer = link.post("/v1/control/list-nodes", WRONG)
    if answer.code != WRONG_TYPE:
        return ok(f"shut from here (status {answer.status})", name=name)
    if link.own:
        return ok("open, and asked on this machine's own address", name=name)
    told = (
        "the control path is reachable from this machine, and whoever reaches it can submit code; "
        "put the proxy before it."
    )
    remedy = "flexlora server init DIR --host HOST (its proxy lets nodes through and nobody else)"
    return warning(told, remedy, name=name)


def check_trainer(path: Path) -> Finding:
    """How the resident trainer behind a socket is, and whether it is of this FlexLoRA."""
    from flexlora.clients.trainer.client import health

    serve = f"flexlora client serve --socket '{path}' ..."
    try:
        told = health(path.absolute())
    except UserError as error:
        return failed(str(error), serve)
    own = flexlora.__version__
    if told.version != own:
        wrong = f"the trainer on '{path}' is FlexLoRA {told.version}, this one is {own}."
        return failed(wrong, f"{serve} (started again from this installation)")
    if told.stopping:
        return warning(f"the trainer on '{path}' is stopping.", serve)
    held = "" if told.quantization == "none" else f" in {told.quantization}"
    doing = f"{told.doing} for {human_seconds(told.seconds)}" if told.doing else "idle"
    return ok(f"FlexLoRA {own} holds {told.model}{held} on {told.device}: {doing}")
