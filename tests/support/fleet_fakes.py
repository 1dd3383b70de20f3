"""What Flower's Control API does with keys, in memory."""

from __future__ import annotations

from datetime import UTC, datetime

from flexlora.deploy.node_keys import make_node_keys, parse_public_key
from flexlora.errors import UserError
from flexlora.server.fleet.control_api import KeyTaken, KnownNode

SEEN = datetime(2026, 11, 30, 12, tzinfo=UTC)


class Superlink:
    """What Flower's Control API does with keys; ``fails`` breaks the next call of a kind off."""

    def __init__(self):
        self.rows, self.fails = {}, set()

    def nodes(self):
        return list(self.rows.values())

    def register(self, pem, name):
        self._break("register")
        if any(row.pem == pem.strip() for row in self.rows.values()):
            raise KeyTaken("known")
        node_id = 1000 + len(self.rows)
        row = KnownNode(node_id=node_id, pem=pem.strip(), name=name, status="registered", seen=None)
        self.rows[node_id] = row
        self._break("after register")
        return node_id

    def unregister(self, node_id):
        self._break("unregister")
        self._set(node_id, "unregistered", self.rows[node_id].seen)

    def connect(self, node_id):
        self._set(node_id, "online", SEEN)

    def _set(self, node_id, status, seen):
        row = self.rows[node_id]
        self.rows[node_id] = KnownNode(
            node_id=node_id, pem=row.pem, name=row.name, status=status, seen=seen
        )

    def _break(self, where):
        if where in self.fails:
            self.fails.remove(where)
            raise UserError("the SuperLink does not answer")


def new_key():
    return parse_public_key(make_node_keys("k").public, "k")
