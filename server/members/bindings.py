"""Who may use which client id: a name belongs to the key that registered it.

Flower gives a registered key a node id that it keeps, and signs every message with the key. The
fleet's table (``fleet/table.py``, named by ``FLEXLORA_FLEET`` in the server's environment) maps
node ids to names. Where it does not name a node, the first node to use a name in a run keeps it
while it is connected, after a resume too; when it is gone, another may go on under the name, since
a node without a registered key comes back under a new id.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flexlora.errors import UserError
from flexlora.server.fleet.table import FleetTable, moment

__all__ = ["FLEET_VARIABLE", "Bindings"]

LOG = logging.getLogger(__name__)
FLEET_VARIABLE = "FLEXLORA_FLEET"


class Bindings:
    """Names by node id from the table at ``path``, and the node that each name has in this run."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.nodes: dict[str, int] = {}  # by client id: the node that used it last
        self._names: dict[int, str] = {}  # of the table
        self._owners: dict[str, set[int]] = {}

    @classmethod
    def of_environment(cls) -> Bindings:
        """The bindings of this process: those of the fleet's table, if one is named."""
        given = os.environ.get(FLEET_VARIABLE, "")
        return cls(Path(given) if given else None)

    def read(self) -> None:
        """Read the table as it is now.

        Raises:
            UserError: it is damaged. A run under way goes on with the one that was read before.
        """
        if self.path is None:
            return
        try:
            table = FleetTable.read(self.path)
        except UserError as error:
            if not self._owners:
                raise
            LOG.warning("the table read before is used: %s", error)
            return
        self._names = table.names_by_node(moment())
        self._owners = {
            name: {key.node_id for key in keys if self._names.get(key.node_id) == name}
            for name, keys in table.nodes.items()
        }

    def name_of(self, node_id: int) -> str:
        """The name that the table gives this node; empty where it gives none."""
        return self._names.get(node_id, "")

    def refusal(self, node_id: int, client_id: str) -> str:
        """Why the table forbids this node to be this client; empty where it does not."""
        name = self._names.get(node_id)
        if name is not None and name != client_id:
            return f"node {node_id} (key of {name}) says it is {client_id}: left out"
        if name is None and client_id in self._owners:
            owners = ", ".join(f"node {owner}" for owner in sorted(self._owners[client_id]))
            whose = f"is {owners}" if owners else "was revoked"
            return f"node {node_id} says it is {client_id}, which {whose}: left out"
        return ""

    def holder(self, client_id: str, node_id: int, connected: Collection[int]) -> int | None:
        """Another connected node that has this name already, if there is one."""
        held = self.nodes.get(client_id)
        return held if held is not None and held != node_id and held in connected else None

    def bind(self, client_id: str, node_id: int) -> None:
        """This node is the client from now on."""
        self.nodes[client_id] = node_id

    def to_dict(self) -> dict[str, str]:
        """For the checkpoint; ids of 64 bits are text."""
        return {client_id: str(node_id) for client_id, node_id in sorted(self.nodes.items())}

    def restore(self, notes: Mapping[str, Any]) -> None:
        """The nodes of a checkpoint's notes."""
        self.nodes = {k: int(node_id) for k, node_id in notes.get("nodes", {}).items()}
