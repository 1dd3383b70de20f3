"""``flexlora doctor``: test by doing what this machine can do."""

from __future__ import annotations

from typing import Annotated

from typer import Option

__all__ = ["doctor"]


def doctor(
    superlink: Annotated[
        list[str] | None, Option(metavar="HOST:PORT", help="try to reach it (repeatable)")
    ] = None,
    root_certificates: Annotated[str, Option(help="who signed the SuperLink's certificate")] = "",
    node_key: Annotated[str, Option(help="this node's private key: is it registered?")] = "",
    trainer_socket: Annotated[str, Option(help="ask the resident trainer how it is")] = "",
    format: Annotated[str, Option(help="text or json")] = "text",
) -> int:
    from flexlora.clients.setup.superlink_checks import node_checks
    from flexlora.deploy.doctor import CHECKS, check_format, diagnose, report
    from flexlora.simulations.flower_checks import check_flower

    check_format(format)
    asked = node_checks(superlink or (), root_certificates, node_key, trainer_socket)
    findings = diagnose([*CHECKS, ("flower", check_flower), *asked])
    return report(findings, format=format)
