"""The rows of ``flexlora fleet list``: the table, the SuperLink's view and the newest run together.

state      pending (asked to be let in), registered (never seen), online, offline, revoked,
           unknown (the SuperLink does not answer, or does not know the key)
why        what a person should know: the outcome of the last round if it was not ok, the cause of a
           node left out, a rotation under way, attempts of a revoked key
"""

from __future__ import annotations

import base64
import binascii
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flexlora.deploy.certificates import printable
from flexlora.deploy.node_keys import fingerprint, public_key_of_pem
from flexlora.errors import UserError
from flexlora.runs.members_file import MEMBERS_FILE, read_members
from flexlora.server.fleet.control_api import KnownNode
from flexlora.server.fleet.invitations import PendingNode
from flexlora.server.fleet.table import RETIRING, REVOKED, FleetTable, NodeKey, moment

__all__ = ["NodeRow", "newest_members", "pending_rows", "read_refused", "rows_of"]

STATE_FOLDERS = ("state/serverapp", "/var/lib/flexlora-server")  # by hand; under systemd
REFUSED_LOG = "state/refused.log"  # nginx writes it (nginx/flexlora.conf)
LONGEST_LOG = 1 << 20  # bytes of its end that are read
ACTIVATE_REFUSED = ("401", "412")  # what Flower answers a key that is not registered


@dataclass(frozen=True, kw_only=True)
class NodeRow:
    """One node of the list; times are ISO 8601 in UTC or empty."""

    name: str
    key: str
    node_id: str = ""
    rank_class: str = ""
    device: str = ""
    version: str = ""
    last_seen: str = ""
    last_reply: str = ""
    state: str = ""
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Attempts to connect with one key that were refused."""

    count: int
    last: str
    address: str


def newest_members(folder: Path, runs: Path | None = None) -> Mapping[str, Mapping]:
    """``members.json`` of the run folder that was written last; empty where there is none."""
    places = [runs] if runs is not None else [folder / p / "runs" for p in STATE_FOLDERS]
    files = [file for place in places for file in place.glob(f"*/{MEMBERS_FILE}")]
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    return read_members(newest if newest is not None else folder / MEMBERS_FILE)


def read_refused(folder: Path) -> dict[str, Refused]:
    """By public key, from the proxy's log: time, address, status and Flower's key header."""
    try:
        with (folder / REFUSED_LOG).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LONGEST_LOG))
            lines = file.read(LONGEST_LOG).decode("ascii", "replace").splitlines()
    except OSError:
        return {}
    counts: Counter[str] = Counter()
    last: dict[str, tuple[str, str]] = {}
    for line in lines:
        when, address, status, header = (line.split() + [""] * 4)[:4]
        if status not in ACTIVATE_REFUSED:
            continue
        try:
            key = public_key_of_pem(base64.b64decode(header, validate=True)).line
        except (UserError, binascii.Error):
            continue
        counts[key] += 1
        last[key] = when, address
    return {
        key: Refused(count=counts[key], last=_utc(when), address=printable(address))
        for key, (when, address) in last.items()
    }


def rows_of(
    table: FleetTable,
    known: Mapping[int, KnownNode],
    run: Mapping[str, Mapping],
    refused: Mapping[str, Refused],
) -> list[NodeRow]:
    """A row per key that is admitted, and the last one of a revoked name; then unnamed nodes."""
    rows, now = [], moment()
    for name, keys in sorted(table.nodes.items()):
        current = [key for key in keys if key.state != REVOKED] or keys[-1:]
        rows += [_row(name, key, known, run, refused, now) for key in current]
    listed = {key.node_id for keys in table.nodes.values() for key in keys}
    return rows + _unnamed(known.values(), listed)


def pending_rows(waiting: Iterable[PendingNode]) -> list[NodeRow]:
    """Nodes that have asked to be let in with an invitation."""
    return [
        NodeRow(
            name=node.name,
            key=fingerprint(node.public_key),
            version=printable(node.version)[:32],
            state="refused" if node.refused else "pending",
            why=printable(
                f"on {node.refused}"
                if node.refused
                else f"asked on {node.asked} from {node.address or 'here'}; `flexlora fleet add "
                f"{node.name}` lets it in"
            ),
        )
        for node in waiting
    ]


def _row(
    name: str,
    key: NodeKey,
    known: Mapping[int, KnownNode],
    run: Mapping[str, Mapping],
    refused: Mapping[str, Refused],
    now: str,
) -> NodeRow:
    node = known.get(key.node_id)
    member = run["members"].get(name, {})
    mine = str(member.get("node_id", "")) == str(key.node_id)
    member = member if mine else {}
    why = [_rotation(key, now), _attempts(key, refused)]
    if key.state != REVOKED:
        why += [_outcome(member), str(run["left_out"].get(name, ""))]
    return NodeRow(
        name=name,
        key=fingerprint(key.public_key),
        node_id=str(key.node_id),
        rank_class=str(member.get("rank_class", "")),
        device=str(member.get("device", "")),
        version=str(member.get("version", "")),
        last_seen=moment(node.seen) if node is not None and node.seen else "",
        last_reply=str(member.get("last_reply", "")),
        state=_state(key, node, bool(known)),
        why=printable("; ".join(filter(None, why))),
    )


def _state(key: NodeKey, node: KnownNode | None, answered: bool) -> str:
    if key.state == REVOKED:
        still = node is not None and node.is_registered
        return "revoked, not yet unregistered" if still else "revoked"
    if node is None or not node.is_registered:
        return "not registered" if answered else "unknown"
    return node.status


def _rotation(key: NodeKey, now: str) -> str:
    if key.state == RETIRING:
        return f"old key, until {key.until}" if key.admits(now) else "old key, its time is over"
    return f"since {key.ended}" if key.state == REVOKED and key.ended else ""


def _attempts(key: NodeKey, refused: Mapping[str, Refused]) -> str:
    tried = refused.get(key.public_key)
    if tried is None or key.state != REVOKED:
        return ""
    times = "once" if tried.count == 1 else f"{tried.count} times"
    return f"tried to connect {times}, last on {tried.last} from {tried.address}, refused"


def _outcome(member: Mapping) -> str:
    outcome, cause = str(member.get("outcome", "")), str(member.get("cause", ""))
    if outcome in ("", "ok"):
        return ""
    return f"round {member.get('round')}: {outcome}" + (f", {cause}" if cause else "")


def _unnamed(known: Iterable[KnownNode], listed: set[int]) -> list[NodeRow]:
    """Nodes that were registered with Flower's own command and whose name is not theirs alone."""
    rows = []
    for node in known:
        if node.is_registered and node.node_id not in listed:
            rows.append(
                NodeRow(
                    name=printable(node.name),
                    key=public_key_of_pem(node.pem).fingerprint,
                    node_id=str(node.node_id),
                    last_seen=moment(node.seen) if node.seen else "",
                    state=node.status,
                    why="not in the table: its name is missing or another key's",
                )
            )
    return rows


def _utc(text: str) -> str:
    try:
        return moment(datetime.fromisoformat(text))
    except ValueError:
        return ""
