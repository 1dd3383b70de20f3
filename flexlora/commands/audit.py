"""``flexlora audit``: a run's log, the epsilon of its canaries, membership of its rows."""

from __future__ import annotations

import json
from typing import Annotated, Any

from typer import Argument, Option

from flexlora.commands.options import PATH
from flexlora.errors import UserError, nearest

__all__ = ["audit"]

LOG, CANARIES, MEMBERSHIP, ALL = PARTS = ("log", "canaries", "membership", "all")


def audit(
    target: Annotated[str, Argument(metavar="RUN", click_type=PATH, help="a run folder")],
    head: Annotated[
        str, Option(metavar="HASH", help="of a line, noted earlier: is it in the log?")
    ] = "",
    part: Annotated[
        str,
        Option(help="log, canaries, membership or all (default: log, and canaries if there are)"),
    ] = "",
    delta: Annotated[
        float | None, Option(help="of epsilon, where no ledger has one (default: the run's)")
    ] = None,
    format: Annotated[str, Option(help="text or json")] = "text",
    allow_changed: Annotated[
        bool, Option("--allow-changed", help="although the base or the rows are others")
    ] = False,
) -> int:
    """1 where the log is broken, or where canaries refute the accountant's epsilon."""
    for name, given, known in (("part", part, PARTS), ("format", format, ("text", "json"))):
        if given and given not in known:
            raise UserError(
                f"--{name} is '{given}', expected one of {', '.join(known)}.{nearest(given, known)}"
            )
    from flexlora.runs.canary_file import CANARY_FILE
    from flexlora.runs.folder import RunFolder

    run, config = RunFolder.open(target)
    asked = {part} if part else {LOG}
    if part == ALL:
        asked = {LOG, MEMBERSHIP}
    if part in ("", ALL) and (run.path / CANARY_FILE).is_file():
        asked.add(CANARIES)
    values: dict[str, Any] = {}
    failed = False
    if LOG in asked:
        failed |= _log(run, head, values, format)
    if CANARIES in asked:
        failed |= _canaries(run, config, delta, values, format)
    if MEMBERSHIP in asked:
        _membership(target, allow_changed, values, format)
    if format == "json":
        print(json.dumps(values, indent=2))
    return int(failed)


def _log(run: Any, head: str, values: dict[str, Any], format: str) -> bool:
    from flexlora.runs.audit_check import check_log, print_findings

    found = check_log(run, head=head)
    if format == "text":
        print_findings(found)
    values[LOG] = {"lines": found.lines, "notes": found.notes, "problems": found.problems}
    return bool(found.problems)


def _canaries(
    run: Any, config: Any, delta: float | None, values: dict[str, Any], format: str
) -> bool:
    from flexlora.report.console import make_console
    from flexlora.report.leakage import canary_report, print_canaries

    found = canary_report(run, config, delta)
    if format == "text":
        print_canaries(found, make_console())
    values[CANARIES] = found.to_dict()
    return found.refuted


def _membership(target: str, allow_changed: bool, values: dict[str, Any], format: str) -> None:
    from flexlora.report.console import make_console
    from flexlora.simulations.membership import membership_of_run, print_membership

    found = membership_of_run(target, allow_changed=allow_changed)
    if format == "text":
        print_membership(found, make_console())
    values[MEMBERSHIP] = [row.to_dict() for row in found]
