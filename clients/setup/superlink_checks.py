"""The checks of ``flexlora doctor`` for a node: its SuperLink and its resident trainer.

Flower's SuperLink serves protobuf over HTTP(S) on one port: ``/v1/fleet/*`` for nodes,
``/v1/control/*`` for those who submit code, ``/health``. No check changes anything there: requests
have a wrong content type, which Flower's protobuf layer refuses before any handler (on the control
path after the login, where there is one).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import flexlora
from flexlora.clients.setup.clock import compare_clocks, default_trust
from flexlora.clients.setup.node_key_checks import check_node_key
from flexlora.deploy.certificates import Authorities, AuthoritiesRefused, read_authorities
from flexlora.deploy.connections import HttpResponse, Link, Stopped
from flexlora.deploy.doctor import Check, Finding, failed, ok, warning
from flexlora.deploy.hosts import split_address
from flexlora.deploy.tls_checks import check_certificate, inspect_endpoint
from flexlora.errors import UserError
from flexlora.units import human_seconds

__all__ = ["check_superlink", "check_trainer", "node_checks"]

PROXY_ERRORS = (502, 503, 504)
REFUSED_TYPE = {"Content-Type": "text/plain"}


def node_checks(
    superlinks: Sequence[str], root_certificates: str, node_key: str, trainer_socket: str
) -> list[Check]:
    """The checks that the command line asks for, not run yet.

    Raises:
        UserError: a malformed address, a flag that needs a SuperLink without one.
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
        host, port = split_address(address, "--superlink")
        checks.append(("superlink", partial(check_superlink, host, port, roots=roots, key=key)))
    if trainer_socket:
        checks.append(("trainer", partial(check_trainer, Path(trainer_socket))))
    return checks


def check_superlink(
    host: str, port: int, *, roots: Path | None = None, key: Path | None = None
) -> list[Finding]:
    """Every step from the name to the node's key, up to the first that stops the others."""
    found: list[Finding] = []
    try:
        for finding in _steps(host, port, roots, key):
            found.append(finding)
    except Stopped as stopped:
        found.append(stopped.finding)
    return found


def _steps(host: str, port: int, roots: Path | None, key: Path | None) -> Iterator[Finding]:
    link = inspect_endpoint(host, port)
    yield from _proxied(link)
    if link.certificate is None:
        yield from _plain_http(link, roots)
    else:
        authorities = _authorities(roots) if roots else None
        context = authorities.context() if authorities else default_trust()
        yield check_certificate(link, link.certificate, context, authorities)
        link = replace(link, context=context)
    health = link.ask("GET", "/health")
    yield _is_superlink(link, health)
    yield compare_clocks(link.address, health)
    yield _control(link)
    if key is not None:
        yield check_node_key(link, key)


def _authorities(path: Path) -> Authorities:
    try:
        return read_authorities(path)
    except AuthoritiesRefused as error:
        raise Stopped(failed(str(error), error.remedy, name="certificate")) from None


def _proxied(link: Link) -> Iterator[Finding]:
    """Flower's HTTP client uses the environment's proxy, these checks do not."""
    scheme = "http" if link.certificate is None else "https"
    proxies = getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    if proxy and not proxy_bypass(link.host):
        where = urlsplit(proxy if "://" in proxy else f"//{proxy}").hostname
        message = (
            f"{scheme.upper()}_PROXY would take Flower's connections to {link.host} through "
            f"'{where}'; these checks went there directly."
        )
        yield warning(message, f"export NO_PROXY={link.host}", name="proxy")


def _plain_http(link: Link, roots: Path | None) -> Iterator[Finding]:
    serve = "flower-superlink --ssl-certfile ... --ssl-keyfile ... --ssl-ca-certfile ..."
    if roots is not None:
        message = f"{link.address} speaks plain HTTP, and root certificates were given for TLS."
        raise Stopped(failed(message, f"{serve} (in place of --insecure)", name="certificate"))
    if not link.is_loopback:
        message = (
            f"{link.address} speaks plain HTTP: whoever is between can read and change what nodes "
            "and server send."
        )
        yield warning(message, f"{serve} (flexlora server init makes them)", name="certificate")


def _is_superlink(link: Link, health: HttpResponse) -> Finding:
    """Whether Flower answers, and its version, which a proxy may hide.

    Raises:
        Stopped: something else answers.
    """
    from flexlora.clients.setup.flower_private import WRONG_TYPE

    fleet = link.ask("POST", "/v1/fleet/activate-node", REFUSED_TYPE)
    spoken = "TLS" if link.context else "plain HTTP"
    if health.status in PROXY_ERRORS or fleet.status in PROXY_ERRORS:
        message = f"{link.address} is a proxy that does not reach its SuperLink ({fleet.status})."
        raise Stopped(failed(message, "flower-superlink ... (does it run, behind the proxy?)"))
    if fleet.code != WRONG_TYPE:
        message = (
            f"{link.address} takes connections and does not answer as a SuperLink does over "
            f"{spoken} (/health: status {health.status}, nodes' path: {fleet.status})."
        )
        raise Stopped(failed(message, "flower-superlink --help (is this its --host and --port?)"))
    version, ours = _version(link), metadata.version("flwr")
    if not version:
        return ok(f"{link.address} is a SuperLink over {spoken}; its version does not show")
    if version.split(".")[:2] != ours.split(".")[:2]:
        message = f"{link.address} is a SuperLink of Flower {version}, this machine has {ours}."
        return warning(message, f"pip install 'flwr=={ours}' (on the server)")
    return ok(f"{link.address} is a SuperLink of Flower {version} over {spoken}")


def _version(link: Link) -> str:
    """The version in the SuperLink's OpenAPI document, "" where a proxy hides it."""
    try:
        info = json.loads(link.ask("GET", "/openapi.json").body)["info"]
        return str(info["version"])[:20] if info["title"] == "SuperLink API" else ""
    except (ValueError, KeyError, TypeError):
        return ""


def _control(link: Link) -> Finding:
    """Whether code can be submitted from here; the request itself is refused in any case."""
    from flexlora.clients.setup.flower_private import WRONG_TYPE

    name = "control path"
    answer = link.ask("POST", "/v1/control/list-nodes", REFUSED_TYPE)
    if answer.code != WRONG_TYPE:
        return ok(f"shut from here (status {answer.status})", name=name)
    if link.is_loopback:
        return ok("open, and asked on this machine's own address", name=name)
    message = (
        "the control path is reachable from this machine, and whoever reaches it can submit code; "
        "put the proxy before it."
    )
    remedy = "flexlora server init DIR --host HOST (its proxy lets nodes through and nobody else)"
    return warning(message, remedy, name=name)


def check_trainer(path: Path) -> Finding:
    """The state of the resident trainer behind a socket, and whether its version is this one."""
    from flexlora.clients.trainer.client import health

    serve = f"flexlora client serve --socket '{path}' ..."
    try:
        state = health(path.absolute())
    except UserError as error:
        return failed(str(error), serve)
    ours = flexlora.__version__
    if state.version != ours:
        wrong = f"the trainer on '{path}' is FlexLoRA {state.version}, this one is {ours}."
        return failed(wrong, f"{serve} (started again from this installation)")
    if state.stopping:
        return warning(f"the trainer on '{path}' is stopping.", serve)
    held = "" if state.quantization == "none" else f" in {state.quantization}"
    doing = f"{state.doing} for {human_seconds(state.seconds)}" if state.doing else "idle"
    return ok(f"FlexLoRA {ours} holds {state.model}{held} on {state.device}: {doing}")
