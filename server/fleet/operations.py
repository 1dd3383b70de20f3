"""Let nodes in, revoke them, replace their keys: the table and the SuperLink changed together.

The table says what is wanted, the SuperLink what is. A key is registered before the table names it
(a crash between the two leaves a registered node with its name, which is adopted), and it is marked
before it is unregistered (a crash leaves a marked key, which is unregistered later): so every
operation begins with ``reconcile`` and ``settle``, and can simply be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flexlora.deploy.hosts import parse_name
from flexlora.deploy.node_keys import PublicKey, fingerprint, parse_public_key, public_key_of_pem
from flexlora.errors import UserError
from flexlora.server.fleet.control_api import ControlApi, KeyTaken, KnownNode, control_api
from flexlora.server.fleet.table import (
    ADMITTED,
    RETIRING,
    REVOKED,
    FleetTable,
    NodeKey,
    changing,
    moment,
)

__all__ = ["Fleet", "fleet_of", "open_fleet", "reconcile", "table_path"]


def table_path(folder: Path) -> Path:
    """The table of a server folder.

    Raises:
        UserError: no folder that ``flexlora server init`` has made.
    """
    if not (folder / "flwr" / "config.toml").is_file() or not (folder / "nodes").is_dir():
        raise UserError(
            f"'{folder}' is no server folder, expected one that `flexlora server init` has made; "
            "give --server DIR."
        )
    return folder / "nodes" / "fleet.json"


def reconcile(table: FleetTable, known: Iterable[KnownNode]) -> FleetTable:
    """The table with the SuperLink's node ids, and with nodes registered there by their names.

    A registered node without a name, or with one that the table gives to another key, stays out.
    """
    for node in known:
        if not node.is_registered:
            continue
        line = public_key_of_pem(node.pem).line
        name = table.name_of(line) or node.name
        key = next((k for k in table.nodes.get(name, ()) if k.public_key == line), None)
        if key is not None and key.node_id != node.node_id:
            table = table.with_key(name, replace(key, node_id=node.node_id))
        elif key is None and name and name not in table.nodes:
            added = NodeKey(public_key=line, node_id=node.node_id, added=moment())
            table = table.with_key(name, added)
    return table


class Fleet:
    """The table and the SuperLink of one server folder, while its lock is held."""

    def __init__(self, folder: Path, table: FleetTable, api: ControlApi) -> None:
        self.folder, self.api = folder, api
        self.known = {node.node_id: node for node in api.nodes()}
        self.table = reconcile(table, self.known.values())
        self.settled: list[str] = []  # what was finished of earlier operations, as sentences

    def settle(self) -> None:
        """Unregister what is revoked, and retiring keys whose successor was seen or whose time is
        over."""
        now = moment()
        for name, keys in self.table.nodes.items():
            seen = any(k.state == ADMITTED and self._was_seen(k) for k in keys)
            for key in keys:
                over = key.state == RETIRING and (seen or not key.admits(now))
                if over:
                    why = "the new key was seen" if seen else f"its time ended on {key.until}"
                    ended = fingerprint(key.public_key)
                    self.settled.append(f"{name}: {ended} is retired, {why}.")
                if over or (key.state == REVOKED and self._is_registered(key)):
                    self._end(name, key)

    def admit(self, name: str, key: PublicKey) -> str:
        """Register ``key`` under ``name``; what was done, as a sentence.

        Raises:
            UserError: a malformed name, a name with another key, a key of another name or one that
                was revoked.
        """
        parse_name(name, "the node's name")
        owner = self.table.name_of(key.line)
        mine = next((k for k in self.table.nodes.get(owner, ()) if k.public_key == key.line), None)
        if owner and owner != name:
            raise UserError(
                f"{name}: this key ({key.fingerprint}) is the one of '{owner}'; each node has its "
                "own: was another node's file copied?"
            )
        if mine is not None and mine.state == REVOKED:
            raise UserError(_taken_back(name, key.fingerprint, mine.ended))
        if mine is not None and self._is_registered(mine):
            return f"{name}: {key.fingerprint} is registered already."
        others = [k for k in self.table.nodes.get(name, ()) if k.state != REVOKED]
        if mine is None and others:
            raise UserError(
                f"{name} has another key already ({fingerprint(others[-1].public_key)}), this one "
                f"is {key.fingerprint}; `flexlora fleet rotate {name} KEY.pub` replaces it, or "
                "give the node another name."
            )
        back = " again, with a new key" if mine is None and self.table.is_revoked(name) else ""
        node_id = self._register(name, key)
        return f"{name}: {key.fingerprint} is registered{back}, node {node_id}."

    def revoke(self, name: str) -> str:
        """Unregister every key of ``name``; the name stays taken.

        Raises:
            UserError: no such name, or all its keys are revoked.
        """
        keys = [key for key in self.table.keys_of(name) if key.state != REVOKED]
        if not keys:
            raise UserError(f"{name} was revoked already, on {self.table.nodes[name][-1].ended}.")
        for key in keys:
            self._end(name, key)
        return (
            f"{name} is revoked: its node is refused from now on. The name stays its own; a new "
            f"key lets it in again (`flexlora fleet add {name} KEY.pub`)."
        )

    def rotate(self, name: str, key: PublicKey, days: int) -> str:
        """Register a second key for ``name``; the first one ends when the second was seen.

        Raises:
            UserError: no such name, a revoked name, a key that somebody has.
        """
        keys = self.table.keys_of(name)
        owner = self.table.name_of(key.line)
        if owner:
            raise UserError(
                f"{name}: the key {key.fingerprint} is known already, as '{owner}'; make a new one."
            )
        if self.table.is_revoked(name):
            raise UserError(
                f"{name} is revoked; `flexlora fleet add {name} KEY.pub` lets it in with this key."
            )
        until = moment(datetime.now(UTC) + timedelta(days=days))
        node_id = self._register(name, key)
        for old in keys:
            if old.state == ADMITTED:
                retiring = replace(old, state=RETIRING, until=until)
                self.table = self.table.with_key(name, retiring)
        return (
            f"{name}: {key.fingerprint} is registered too, node {node_id}. The old key ends when "
            f"the new one was seen, or on {until}."
        )

    def register_again(self) -> list[str]:
        """Register admitted keys that the SuperLink does not know: its database is another one."""
        done = []
        for name, keys in self.table.nodes.items():
            for key in keys:
                if key.admits(moment()) and not self._is_registered(key):
                    public = parse_public_key(key.public_key.encode(), name)
                    self.table = self.table.with_key(name, replace(key, node_id=0))
                    done.append(f"{name}: node {self._register(name, public)}, registered again.")
        return done

    def _register(self, name: str, key: PublicKey) -> int:
        try:
            node_id = self.api.register(key.pem, name)
        except KeyTaken:
            raise UserError(_taken_back(name, key.fingerprint, "")) from None
        added = NodeKey(public_key=key.line, node_id=node_id, added=moment())
        before = next((k for k in self.table.nodes.get(name, ()) if k.public_key == key.line), None)
        if before is not None:
            added = replace(before, node_id=node_id)
        self.table = self.table.with_key(name, added)
        self.known[node_id] = KnownNode(
            node_id=node_id, pem=key.pem, name=name, status="registered", seen=None
        )
        return node_id

    def _end(self, name: str, key: NodeKey) -> None:
        """Mark the key in the table, on the disk too, then unregister it."""
        ended = key.ended or moment()
        self.table = self.table.with_key(name, replace(key, state=REVOKED, ended=ended))
        self.table.write(table_path(self.folder))
        if self._is_registered(key):
            self.api.unregister(key.node_id)
            self.known[key.node_id] = replace(self.known[key.node_id], status="unregistered")

    def _is_registered(self, key: NodeKey) -> bool:
        node = self.known.get(key.node_id)
        return node is not None and node.is_registered

    def _was_seen(self, key: NodeKey) -> bool:
        node = self.known.get(key.node_id)
        return node is not None and node.seen is not None


@contextmanager
def open_fleet(folder: Path) -> Iterator[Fleet]:
    """The fleet of a server folder for changing: locked, reconciled, and written at the end.

    Raises:
        UserError: no server folder, another operator at work, a damaged table, no SuperLink.
    """
    path = table_path(folder)
    with changing(path), control_api(folder) as api:
        before = FleetTable.read(path)
        fleet = Fleet(folder, before, api)
        try:
            fleet.settle()
            yield fleet
        finally:
            if fleet.table != before:
                fleet.table.write(path)


def fleet_of(folder: Path) -> tuple[FleetTable, Mapping[int, KnownNode], list[str]]:
    """The table, the SuperLink's nodes, and sentences: what was settled, or why that was not.

    Somebody who may only read, or a SuperLink that is down, gets the table as it is.

    Raises:
        UserError: no server folder, or a damaged table.
    """
    path = table_path(folder)
    try:
        with open_fleet(folder) as fleet:
            pass
        return fleet.table, fleet.known, fleet.settled
    except UserError as error:
        table, said = FleetTable.read(path), [str(error)]
    try:
        with control_api(folder) as api:
            known = api.nodes()
    except UserError as error:
        return table, {}, [f"Without the SuperLink's view: {error}"]
    return reconcile(table, known), {node.node_id: node for node in known}, said


def _taken_back(name: str, key: str, when: str) -> str:
    on = f" on {when}" if when else ""
    return (
        f"{name}: the key {key} was revoked{on}, and Flower takes no key back; make a new one on "
        f"the node (`ssh-keygen -t ecdsa -b 256 -N '' -f keys/node`) and give that."
    )
