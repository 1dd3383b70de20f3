"""``flexlora server init``: a ready folder for the machine that a federation meets on.

An authority and a server certificate, start scripts, systemd units, a proxy that lets sites reach
Flower's Fleet API and nothing else, a Dockerfile, the run's own ``pyproject.toml`` (no code: Flower
ships what is in it to the nodes), and a README of the steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv6Address
from pathlib import Path
from string import Template
from typing import Annotated

import tomli_w
from typer import Argument, Option

import flexlora
from flexlora.commands.options import PATH
from flexlora.config.resolve import flower_table
from flexlora.deploy.certificates import Issued, make_authority, make_server
from flexlora.deploy.folder import SECRET, File, check_free, fill_tree, write_folder
from flexlora.deploy.hosts import Host, join_address, parse_host, parse_port, plain
from flexlora.deploy.machine import flower_version, programs, requirements
from flexlora.deploy.node_keys import make_secret
from flexlora.errors import UserError, nearest
from flexlora.server.fleet.certificates import AUTHORITY_DAYS
from flexlora.server.fleet.table import FleetTable

__all__ = ["server_init"]

TEMPLATES = Path(__file__).parent / "templates"
DASHBOARD = TEMPLATES / "grafana-dashboard.json"
ALERTS = TEMPLATES / "prometheus-alerts.yaml"
PROXIES = ("nginx", "none")
OF_PROXY = (
    "bin/start-proxy",
    "bin/start-enrolment",
    "systemd/flexlora-enrolment.service",
    "systemd/sysusers-flexlora-fleet.conf",
)
EMPTY = {"state": 0o700, "nodes/registered": 0o755, "docker/wheels": 0o755}


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where the SuperLink listens, and how this machine's own programs reach it."""

    bind: str
    port: int

    @property
    def local(self) -> str:
        """``HOST:PORT`` on this machine."""
        return f"[::1]:{self.port}" if ":" in self.bind else f"127.0.0.1:{self.port}"

    @property
    def enrolment(self) -> int:
        """The port of the enrolment behind the proxy."""
        return self.port + 2 if self.port < 65534 else self.port - 2

    @classmethod
    def of(cls, port: int, proxy: str, hosts: Sequence[Host]) -> Listening:
        """On loopback behind a proxy; without one, where the named hosts are."""
        if proxy != "none":
            behind = port + 1 if port < 65535 else port - 1
            return cls(bind="127.0.0.1", port=behind)
        outside = [host for host in hosts if not host.is_loopback]
        if not outside:
            return cls(bind="127.0.0.1", port=port)
        only_v6 = all(isinstance(host.address, IPv6Address) for host in outside)
        return cls(bind="::" if only_v6 else "0.0.0.0", port=port)


def server_init(
    folder: Annotated[
        str, Argument(metavar="DIR", click_type=PATH, help="folder to make, not there yet")
    ],
    host: Annotated[
        list[str] | None, Option(metavar="NAME", help="how nodes reach this machine (repeatable)")
    ] = None,
    port: Annotated[int, Option(help="that nodes reach")] = 9092,
    days: Annotated[int, Option(help="that the certificate lasts")] = 825,
    proxy: Annotated[str, Option(help="nginx or none")] = "nginx",
) -> None:
    """Write the folder and say where to go on.

    Raises:
        UserError: a host that is none, a port or a number of days out of range, a folder that is
            taken.
    """
    if not host:
        raise UserError(
            "--host is missing, expected the name or address by which nodes reach this "
            "machine, such as --host fl.example.org; it may be given several times."
        )
    if not 1 <= days <= AUTHORITY_DAYS:
        raise UserError(
            f"--days is {days}, expected 1 to {AUTHORITY_DAYS}, the authority's own life."
        )
    if proxy not in PROXIES:
        raise UserError(
            f"--proxy is '{proxy}', expected one of {', '.join(PROXIES)}.{nearest(proxy, PROXIES)}"
        )
    hosts = [parse_host(text, "--host") for text in host]
    port = parse_port(port, "--port")
    path = check_free(folder)
    plain(path, "the folder")
    authority = make_authority(f"FlexLoRA federation of {hosts[0].text}"[:64], days=AUTHORITY_DAYS)
    server = make_server(authority, hosts, days=days)
    about = {"folder": str(path), "port": str(port), "days": str(days)}
    values = _values(about, port, proxy, hosts, authority, server)
    write_folder(path, _files(proxy, values, authority, server), empty=EMPTY)
    print(f"{path} is ready; follow {path}/README.md.")
    print(f"Give {path}/ca.crt to every node, and take {path}/private/ca.key off this machine.")


def _files(proxy: str, values: dict[str, str], authority: Issued, server: Issued) -> list[File]:
    def wanted(path: str) -> bool:
        of_nginx = path.startswith("nginx/") or path in OF_PROXY
        return proxy == "nginx" or not of_nginx

    return [
        *fill_tree(TEMPLATES / "folder", values, wanted=wanted),
        File(path="grafana-dashboard.json", content=DASHBOARD.read_bytes()),
        File(path="prometheus-alerts.yaml", content=ALERTS.read_bytes()),
        File(path="app/pyproject.toml", content=_app()),
        File(path="nodes/fleet.json", content=FleetTable().to_json()),
        File(path="ca.crt", content=authority.certificate_pem),
        File(path="private/ca.key", content=authority.key_pem, mode=SECRET),
        File(path="server.crt", content=server.certificate_pem),
        File(path="tls/server.key", content=server.key_pem, mode=SECRET),
        File(path="tls/superexec.secret", content=make_secret(), mode=SECRET),
    ]


def _values(
    about: dict[str, str],
    port: int,
    proxy: str,
    hosts: Sequence[Host],
    authority: Issued,
    server: Issued,
) -> dict[str, str]:
    """What the templates are filled in with, beside ``about``."""
    listening = Listening.of(port, proxy, hosts)
    values = about | {
        "programs": programs(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "version": flexlora.__version__,
        "flwr": flower_version(),
        "requirements": requirements(),
        "uid": str(os.geteuid()),
        "gid": str(os.getegid()),
        "host": hosts[0].text,
        "address": join_address(hosts[0].text, port),
        "enrolment_port": str(listening.enrolment),
        "hosts": ", ".join(f"`{host.text}`" for host in hosts),
        "superlink_port": str(listening.port),
        "bind": listening.bind,
        "local": listening.local,
        "expires": _day(server.certificate.not_valid_after_utc),
        "authority_expires": _day(authority.certificate.not_valid_after_utc),
        "listen": "\n".join(f"    listen {where} ssl;" for where in _outside(port, hosts)),
        "server_names": " ".join(_server_name(host) for host in hosts),
        "superlink_addresses": "# Nodes connect from anywhere: no address is shut out.",
    }
    behind = proxy == "nginx"
    if behind:
        values["superlink_addresses"] = "IPAddressDeny=any\nIPAddressAllow=localhost"
    return values | {
        "exposed": _part(f"exposed-{proxy}.md", values),
        "start_proxy": _part("start-nginx.md", values) if behind else "",
        "systemd_proxy": _part("systemd-nginx.md", values) if behind else "",
        "proxy_service": _part("proxy-service.yaml", values) if behind else "",
    }


def _part(name: str, values: dict[str, str]) -> str:
    return Template((TEMPLATES / "parts" / name).read_text(encoding="utf-8")).substitute(values)


def _app() -> bytes:
    """The app that ``flwr run`` submits: two names of installed modules and the configuration."""
    table = {
        "project": {
            "name": "flexlora",
            "version": flexlora.__version__,
            "description": "A federation of one's own",
            "license": "Apache-2.0",
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "flexlora",
                    "fab-include": ["pyproject.toml"],
                    "components": {
                        "serverapp": "flexlora.server.app:app",
                        "clientapp": "flexlora.clients.app:app",
                    },
                    # Few nodes, each asked for: everybody trains in every round.
                    "config": flower_table() | {"fraction-train": 1.0},
                }
            }
        },
    }
    return tomli_w.dumps(table).encode()


def _outside(port: int, hosts: Sequence[Host]) -> list[str]:
    """Where the proxy listens: on loopback where no other host is named."""
    if all(host.is_loopback for host in hosts):
        return [f"127.0.0.1:{port}"]
    wants_v6 = any(isinstance(host.address, IPv6Address) for host in hosts)
    return [str(port), *([f"[::]:{port}"] if wants_v6 else [])]


def _server_name(host: Host) -> str:
    return f"[{host.text}]" if isinstance(host.address, IPv6Address) else host.text


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d}"
