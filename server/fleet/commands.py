"""``flexlora fleet list|add|revoke|rotate``: what an operator does with the nodes of a server.

All of them work on the folder that ``flexlora server init`` has made, ``--server DIR`` or the
current one, and ask the SuperLink of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from flexlora.commands.options import PATH
from flexlora.deploy.node_keys import fingerprint, parse_public_key, read_public_key
from flexlora.errors import UserError, nearest
from flexlora.server.fleet.certificates import AUTHORITY_CHOICES, change_authority, renew
from flexlora.server.fleet.invitations import PendingNodes
from flexlora.server.fleet.listing import (
    NodeRow,
    newest_members,
    pending_rows,
    read_refused,
    rows_of,
)
from flexlora.server.fleet.operations import Fleet, fleet_of, open_fleet, table_path
from flexlora.server.fleet.table import moment

__all__ = ["fleet_add", "fleet_list", "fleet_revoke", "fleet_rotate"]

Server = Annotated[
    str, Option(metavar="DIR", click_type=PATH, help="the server's folder (default: this one)")
]
COLUMNS = {
    "name": "NAME",
    "key": "KEY",
    "rank_class": "CLASS",
    "device": "DEVICE",
    "version": "VERSION",
    "last_seen": "LAST SEEN",
    "last_reply": "LAST REPLY",
    "state": "STATE",
    "why": "WHY",
}
OVERLAP_DAYS, CERTIFICATE_DAYS = 7, 825
SHOWN_KEY = 20  # characters of a fingerprint in the table; --json has it whole


def fleet_list(
    server: Server = ".",
    runs: Annotated[
        str, Option(metavar="DIR", click_type=PATH, help="run folders (default: the server's own)")
    ] = "",
    as_json: Annotated[bool, Option("--json", help="one JSON object")] = False,
) -> None:
    """Every node: name, key, rank class, device, version, last seen, last reply, state and why.

    Raises:
        UserError: no server folder, or a damaged table.
    """
    folder = _folder(server)
    table, known, remarks = fleet_of(folder)
    run = newest_members(folder, Path(runs) if runs else None)
    rows = rows_of(table, known, run, read_refused(folder))
    rows += pending_rows(PendingNodes(folder).all())
    if as_json:
        fields = {"remarks": remarks, "run_written": run["written"]}
        print(json.dumps({**fields, "nodes": [asdict(row) for row in rows]}, indent=1))
        return
    for remark in remarks:
        print(remark)
    print(_as_table(rows) if rows else "No node yet: `flexlora fleet add NAME KEY.pub`.")


def fleet_add(
    name: Annotated[str, Argument(metavar="NAME", help="the node's name, its --client-id")] = "",
    key: Annotated[
        str,
        Argument(
            metavar="KEY.pub", click_type=PATH, help="its key (else: who waits, or nodes/NAME.pub)"
        ),
    ] = "",
    everybody: Annotated[bool, Option("--all", help="every nodes/NAME.pub")] = False,
    server: Server = ".",
) -> int:
    """Let nodes in; those that are refused do not hold up the others.

    Raises:
        UserError: no name and no ``--all``, or a key that cannot be registered under the name.
    """
    folder = _folder(server)
    if everybody == bool(name):
        raise UserError("expected NAME (with its KEY.pub), or --all for every key in nodes/.")
    with open_fleet(folder) as fleet:
        if not everybody:
            print(fleet.admit(name, read_public_key(Path(key))) if key else _add(fleet, name))
            return 0
        for done in [*fleet.settled, *fleet.register_again()]:
            print(done)
        files = sorted((folder / "nodes").glob("*.pub"))
        refused = _each([file.stem for file in files], lambda name: _add_file(fleet, name))
        if not files:
            print(f"No new key in {folder}/nodes.")
        return 2 if refused else 0


def fleet_revoke(
    names: Annotated[list[str], Argument(metavar="NAME ...", help="whose keys are revoked")],
    server: Server = ".",
) -> int:
    """Refuse nodes from now on; a name stays taken.

    Raises:
        UserError: no server folder, another operator at work.
    """
    with open_fleet(_folder(server)) as fleet:
        return 2 if _each(names, lambda name: _revoke(fleet, name)) else 0


def fleet_rotate(
    name: Annotated[str, Argument(metavar="NAME", help="the node's name")] = "",
    key: Annotated[str, Argument(metavar="NEWKEY.pub", click_type=PATH, help="its next key")] = "",
    days: Annotated[
        int, Option(help="that the old key is admitted too (default 7), or a certificate lasts")
    ] = 0,
    certificates: Annotated[
        bool, Option("--certificates", help="a new certificate of the server")
    ] = False,
    authority: Annotated[
        str, Option(metavar="new|only", help="add a new authority, or drop the old ones")
    ] = "",
    server: Server = ".",
) -> None:
    """Let a node in with a second key; the first ends when the second was seen. Or renew what the
    nodes trust the server by.

    Raises:
        UserError: no such name, a key that is known already, an authority whose key is not here.
    """
    folder = _folder(server)
    if [bool(name and key), certificates, bool(authority)].count(True) != 1 or bool(name) != bool(
        key
    ):
        raise UserError("expected NAME NEWKEY.pub, or --certificates, or --authority new|only.")
    if certificates:
        print(renew(folder, days or CERTIFICATE_DAYS))
    elif authority:
        if authority not in AUTHORITY_CHOICES:
            hint = nearest(authority, AUTHORITY_CHOICES)
            raise UserError(f"--authority is '{authority}', expected new or only.{hint}")
        print(change_authority(folder, authority))
    else:
        days = days or OVERLAP_DAYS
        if not 1 <= days <= 90:
            raise UserError(f"--days is {days}, expected 1 to 90.")
        with open_fleet(folder) as fleet:
            print(fleet.rotate(name, read_public_key(Path(key)), days))


def _folder(server: str) -> Path:
    folder = Path(server).resolve()
    table_path(folder)
    return folder


def _add(fleet: Fleet, name: str) -> str:
    """Admit the request that waits under a name, or ``nodes/NAME.pub``."""
    waiting = PendingNodes(fleet.folder)
    asked = waiting.get(name)
    if asked is not None:
        done = fleet.admit(name, parse_public_key(asked.public_key.encode(), name))
        waiting.remove(name)
        return done
    files = fleet.folder / "nodes"
    if (files / f"{name}.pub").is_file():
        return _add_file(fleet, name)
    known = nearest(
        name, [*(p.stem for p in files.glob("*.pub")), *(n.name for n in waiting.all())]
    )
    raise UserError(
        f"{name}: no node waits under this name, and '{files}/{name}.pub' is not there; give its "
        f"KEY.pub too.{known}"
    )


def _revoke(fleet: Fleet, name: str) -> str:
    """Revoke a node, or turn a waiting one away."""
    waiting = PendingNodes(fleet.folder)
    asked = waiting.get(name)
    if asked is None or name in fleet.table.nodes:
        return fleet.revoke(name)
    waiting.put(replace(asked, refused=moment()))
    return f"{name}: the request of {fingerprint(asked.public_key)} is refused."


def _add_file(fleet: Fleet, name: str) -> str:
    """Admit ``nodes/NAME.pub`` and put it away."""
    file = fleet.folder / "nodes" / f"{name}.pub"
    done = fleet.admit(name, read_public_key(file))
    away = fleet.folder / "nodes" / "registered"
    away.mkdir(exist_ok=True)
    file.replace(away / file.name)
    return done


def _each(names: Sequence[str], change: Callable[[str], str]) -> int:
    """``change`` for every name; prints what was done or refused, returns how many were refused."""
    refused = 0
    for name in names:
        try:
            print(change(name))
        except UserError as error:
            refused += 1
            print(f"refused: {error}")
    return refused


def _as_table(rows: Sequence[NodeRow]) -> str:
    cells = [list(COLUMNS.values())]
    for row in rows:
        values = asdict(row) | {"key": row.key.removeprefix("SHA256:")[:SHOWN_KEY]}
        cells.append([_shown(name, values[name]) for name in COLUMNS])
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    padded = (
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )
    return "\n".join(padded)


def _shown(name: str, text: str) -> str:
    if name.startswith("last_"):
        text = text.replace("T", " ")[:16]  # to the minute, in UTC
    return text or "-"
