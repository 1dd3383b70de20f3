"""``flexlora fleet list|add|revoke|rotate``: what an operator does with the nodes of a server.

All of them work on the folder that ``flexlora server init`` has made, ``--server DIR`` or the
current one, and ask the SuperLink of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from flexlora.commands.options import PATH
from flexlora.deploy.node_keys import read_public_key
from flexlora.errors import UserError, nearest
from flexlora.server.fleet.listing import NodeRow, newest_members, read_refused, rows_of
from flexlora.server.fleet.operations import Fleet, fleet_of, open_fleet, table_path

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
    if as_json:
        told = {"remarks": remarks, "run_written": run["written"]}
        print(json.dumps({**told, "nodes": [asdict(row) for row in rows]}, indent=1))
        return
    for remark in remarks:
        print(remark)
    print(_as_table(rows) if rows else "No node yet: `flexlora fleet add NAME KEY.pub`.")


def fleet_add(
    name: Annotated[str, Argument(metavar="NAME", help="the node's name, its --client-id")] = "",
    key: Annotated[
        str,
        Argument(metavar="KEY.pub", click_type=PATH, help="its public key (else nodes/NAME.pub)"),
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
            print(_add(fleet, name, Path(key) if key else folder / "nodes" / f"{name}.pub"))
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
        return 2 if _each(names, fleet.revoke) else 0


def fleet_rotate(
    name: Annotated[str, Argument(metavar="NAME", help="the node's name")],
    key: Annotated[str, Argument(metavar="NEWKEY.pub", click_type=PATH, help="its next key")],
    days: Annotated[int, Option(help="that the old key is admitted too, at most")] = 7,
    server: Server = ".",
) -> None:
    """Let a node in with a second key; the first ends when the second was seen.

    Raises:
        UserError: no such name, a key that is known already.
    """
    if not 1 <= days <= 90:
        raise UserError(f"--days is {days}, expected 1 to 90.")
    with open_fleet(_folder(server)) as fleet:
        print(fleet.rotate(name, read_public_key(Path(key)), days))


def _folder(server: str) -> Path:
    folder = Path(server).resolve()
    table_path(folder)
    return folder


def _add(fleet: Fleet, name: str, file: Path) -> str:
    if not file.is_file() and file.parent == fleet.folder / "nodes":
        known = nearest(name, [path.stem for path in file.parent.glob("*.pub")])
        raise UserError(f"{name}: '{file}' is not there; give its KEY.pub too.{known}")
    return fleet.admit(name, read_public_key(file))


def _add_file(fleet: Fleet, name: str) -> str:
    """Admit ``nodes/NAME.pub`` and put it away."""
    file = fleet.folder / "nodes" / f"{name}.pub"
    done = _add(fleet, name, file)
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
