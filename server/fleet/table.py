"""The fleet's table, ``nodes/fleet.json``: every node's name and the keys that it may use.

A key gets a node id from Flower when it is registered; a message's node id names the key that
signed it. So the table binds a client's name to keys. Names stay in it after a revoke: nobody else
gets them. It is replaced as a whole (``write_atomically``) under a lock.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from flexlora.errors import UserError, nearest
from flexlora.wire.files import write_atomically

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "ADMITTED",
    "RETIRING",
    "REVOKED",
    "FleetTable",
    "NodeKey",
    "changing",
    "give_to_owner",
    "moment",
]

ADMITTED, RETIRING, REVOKED = "admitted", "retiring", "revoked"
STATES = (ADMITTED, RETIRING, REVOKED)
FORMAT = 1


def moment(when: datetime | None = None) -> str:
    """ISO 8601 in UTC, to the second."""
    return (when or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, kw_only=True)
class NodeKey:
    """One public key (OpenSSH, without a comment) and the node id that Flower gave it.

    ``node_id`` is 0 until it is registered. ``until`` is the end of a retiring key, ``ended`` when
    it was unregistered.
    """

    public_key: str
    node_id: int = 0
    state: str = ADMITTED
    added: str = ""
    until: str = ""
    ended: str = ""

    def admits(self, now: str) -> bool:
        """Whether a node with this key may take part at ``now``."""
        return self.state == ADMITTED or (self.state == RETIRING and now < self.until)


@dataclass(frozen=True, kw_only=True)
class FleetTable:
    """Keys by name, oldest first."""

    nodes: Mapping[str, tuple[NodeKey, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> FleetTable:
        """The table; without a file an empty one.

        Raises:
            UserError: it cannot be read, or is no such table.
        """
        try:
            return cls._of(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise UserError(f"'{path}' cannot be read: {error.strerror or error}.") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"'{path}' is no table of nodes ({error}); restore it from a backup, or move it "
                "away and run `flexlora fleet add --all`: it is made anew from the SuperLink's own."
            ) from None

    @classmethod
    def _of(cls, read: dict) -> FleetTable:
        if read["format"] != FORMAT:
            raise ValueError(f"format {read['format']}, expected {FORMAT}")
        known = {field.name for field in fields(NodeKey)}
        nodes = {}
        for name, keys in read["nodes"].items():
            rows = [{k: v for k, v in key.items() if k in known} for key in keys]
            nodes[name] = tuple(NodeKey(**row | {"node_id": int(row["node_id"])}) for row in rows)
            for key in nodes[name]:
                if key.state not in STATES or not isinstance(key.public_key, str):
                    raise ValueError(f"'{name}' has a key whose state is {key.state!r}")
        return cls(nodes=nodes)

    def write(self, path: Path) -> None:
        """Replace the file; it belongs to whoever owns the folder, also where root writes it."""
        write_atomically(path, self.to_json())
        path.chmod(0o644)
        give_to_owner(path)

    def to_json(self) -> bytes:
        """The file's content; node ids are text, since JSON readers round numbers of 64 bits."""
        rows = {
            name: [asdict(key) | {"node_id": str(key.node_id)} for key in keys]
            for name, keys in sorted(self.nodes.items())
        }
        return (json.dumps({"format": FORMAT, "nodes": rows}, indent=1) + "\n").encode()

    def is_revoked(self, name: str) -> bool:
        """Whether no key of a known name is admitted any more."""
        keys = self.nodes.get(name, ())
        return bool(keys) and all(key.state == REVOKED for key in keys)

    def keys_of(self, name: str) -> tuple[NodeKey, ...]:
        """The keys of a known name.

        Raises:
            UserError: nobody has this name; with the nearest one.
        """
        if name not in self.nodes:
            known = nearest(name, self.nodes) or " `flexlora fleet list` shows the names."
            raise UserError(f"no node is named '{name}'.{known}")
        return self.nodes[name]

    def name_of(self, public_key: str) -> str:
        """Who has this key, also a revoked one; else the empty string."""
        owners = (n for n, keys in self.nodes.items() for k in keys if k.public_key == public_key)
        return next(owners, "")

    def names_by_node(self, now: str) -> dict[int, str]:
        """The name of every node id whose key admits at ``now``."""
        return {
            key.node_id: name
            for name, keys in self.nodes.items()
            for key in keys
            if key.node_id and key.admits(now)
        }

    def with_key(self, name: str, key: NodeKey) -> FleetTable:
        """With ``key`` as the newest one of ``name``, or in place of the same public key."""
        keys = {k.public_key: k for k in self.nodes.get(name, ())} | {key.public_key: key}
        return replace(self, nodes={**self.nodes, name: tuple(keys.values())})


@contextmanager
def changing(path: Path, wait_seconds: float = 10.0) -> Iterator[None]:
    """Lock the table against other operators until the end of the block.

    Raises:
        UserError: somebody else is changing it all the time, or the folder cannot be written to.
    """
    try:
        lock = path.with_suffix(".lock").open("a")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"'{path.parent}' cannot be written to: {reason}; use sudo?") from None
    with lock:
        give_to_owner(path.with_suffix(".lock"))
        deadline = time.monotonic() + wait_seconds
        while not _locked(lock.fileno()):
            if time.monotonic() >= deadline:
                raise UserError(
                    f"another `flexlora fleet` is changing '{path}' for {wait_seconds:g} s; run "
                    "this again when it is done."
                )
            time.sleep(0.05)
        yield


def _locked(number: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def give_to_owner(path: Path) -> None:
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid)
