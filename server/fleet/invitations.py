"""Invitations and the requests that came with them, in ``nodes/``.

``invitations.json`` has no secrets, only their digests; ``pending/NAME.json`` is a node that waits
for an operator, or one that he has turned away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flexlora.errors import UserError
from flexlora.server.fleet.table import give_to_owner
from flexlora.wire.files import write_atomically

__all__ = ["Invitation", "Invitations", "PendingNode", "PendingNodes"]

FORMAT = 1
KEPT_DAYS = 30  # an expired invitation is remembered, so that its token is told from a wrong one


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """``name`` is the only one that may come, or empty; ``used`` are public keys."""

    id: str
    secret_digest: str
    made: str
    expires: str
    name: str = ""
    count: int = 1
    approve: bool = False
    used: tuple[str, ...] = ()


class Invitations:
    """The file of all invitations."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "nodes" / "invitations.json"

    def read(self) -> dict[str, Invitation]:
        """By id.

        Raises:
            UserError: the file is damaged, or not this user's to read.
        """
        try:
            read = json.loads(self.file.read_bytes())
            rows = read["invitations"]
            return {row["id"]: Invitation(**row | {"used": tuple(row["used"])}) for row in rows}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"'{self.file}' cannot be read: {error.strerror or error}.") from None
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"'{self.file}' is damaged ({error}); delete it and invite again."
            ) from None

    def put(self, invitation: Invitation, *, oldest: str) -> None:
        """Add or replace one; those that expired before ``oldest`` are forgotten."""
        rows = {k: v for k, v in self.read().items() if v.expires >= oldest}
        rows[invitation.id] = invitation
        table = {"format": FORMAT, "invitations": [asdict(row) for row in rows.values()]}
        self.file.touch(mode=0o600)
        write_atomically(self.file, (json.dumps(table, indent=1) + "\n").encode())
        self.file.chmod(0o600)
        give_to_owner(self.file)

    def use(self, invitation: Invitation, public_key: str, *, oldest: str) -> None:
        """Count one more key."""
        used = (*invitation.used, public_key)
        self.put(replace(invitation, used=used), oldest=oldest)


@dataclass(frozen=True, kw_only=True)
class PendingNode:
    """A request that waits, or was turned away."""

    name: str
    public_key: str
    asked: str
    address: str = ""
    version: str = ""
    invitation: str = ""
    refused: str = ""


class PendingNodes:
    """``nodes/pending``, a file for each name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "nodes" / "pending"

    def get(self, name: str) -> PendingNode | None:
        """The request under a name, if there is one that can be read."""
        try:
            read: Any = json.loads((self.folder / f"{name}.json").read_bytes())
            return PendingNode(**read)
        except (OSError, ValueError, TypeError):
            return None

    def all(self) -> Iterator[PendingNode]:
        """By name."""
        for file in sorted(self.folder.glob("*.json")):
            node = self.get(file.stem)
            if node is not None:
                yield node

    def put(self, node: PendingNode) -> None:
        """Write one."""
        file = self.folder / f"{node.name}.json"
        write_atomically(file, (json.dumps(asdict(node), indent=1) + "\n").encode())
        give_to_owner(self.folder)
        give_to_owner(file)

    def remove(self, name: str) -> None:
        """Forget one."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)
