"""The SuperLink's Control API on this machine: the nodes that it knows, register, unregister.

Flower's private names, all of them here (``tests/server/fleet/test_control_api.py`` asks a real
SuperLink):

    ControlHttpClient       ``ListNodes``, ``RegisterNode``, ``UnregisterNode``: what the commands
                            ``flwr supernode list``, ``register`` and ``unregister`` call; those
                            print neither keys nor names, and take a second each
    NodeInfo                ``node_id``, ``status``, ``public_key`` (PEM), ``name``,
                            ``last_activated_at``, ``last_deactivated_at``, ``online_until``,
                            ``heartbeat_interval``
    HEARTBEAT_PATIENCE      heartbeats that may be missed: ``online_until`` is that many intervals
                            after the last one
    FlowerError, ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE
                            what is answered where a key was registered before, also one that has
                            been unregistered since
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    UnregisterNodeRequest,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError

from flexlora.errors import UserError, one_line

__all__ = ["ControlApi", "KeyTaken", "KnownNode", "control_api"]

UNREGISTERED = "unregistered"
ONLINE = "online"
T = TypeVar("T")


class KeyTaken(UserError):
    """Flower knows this key already, maybe as an unregistered one: it never takes a key twice."""


@dataclass(frozen=True, kw_only=True)
class KnownNode:
    """A node as the SuperLink sees it; times are in UTC, None where there was none."""

    node_id: int
    pem: bytes
    name: str
    status: str
    seen: datetime | None

    @property
    def is_registered(self) -> bool:
        return self.status != UNREGISTERED

    @property
    def is_online(self) -> bool:
        return self.status == ONLINE

    @classmethod
    def of(cls, info: NodeInfo) -> KnownNode:
        """Of Flower's record: an online node was seen at its last heartbeat."""
        seen = None
        if info.status == ONLINE and info.online_until:
            last = info.online_until - HEARTBEAT_PATIENCE * info.heartbeat_interval
            seen = datetime.fromtimestamp(last, UTC)
        elif info.last_deactivated_at or info.last_activated_at:
            text = info.last_deactivated_at or info.last_activated_at
            seen = datetime.fromisoformat(text).astimezone(UTC)
        return cls(
            node_id=info.node_id,
            pem=info.public_key.strip(),
            name=info.name,
            status=info.status,
            seen=seen,
        )


class ControlApi:
    """One connection to the SuperLink of a server folder."""

    def __init__(self, client: ControlHttpClient, address: str) -> None:
        self._client, self.address = client, address

    def nodes(self) -> list[KnownNode]:
        """Every node that was ever registered here, unregistered ones too."""
        answer = self._call(lambda: self._client.ListNodes(ListNodesRequest()))
        return [KnownNode.of(info) for info in answer.nodes_info]

    def register(self, pem: bytes, name: str) -> int:
        """Let the node with this public key connect; returns its node id.

        Raises:
            KeyTaken: the key was registered before.
        """
        request = RegisterNodeRequest(public_key=pem, name=name)
        answer = self._call(lambda: self._client.RegisterNode(request))
        return int(answer.node_id)

    def unregister(self, node_id: int) -> None:
        """From now on the node is refused, and so is its key for ever."""
        request = UnregisterNodeRequest(node_id=node_id)
        self._call(lambda: self._client.UnregisterNode(request))

    def _call(self, request: Callable[[], T]) -> T:
        try:
            return request()
        except httpx.HTTPStatusError as error:
            refusal = FlowerError.from_json(error.response.text)
            if refusal is not None and refusal.code == ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                raise KeyTaken("the SuperLink knows this key already.") from None
            cause = refusal.message if refusal is not None else one_line(error)
            raise UserError(f"the SuperLink at {self.address} refuses: {cause}") from None
        except httpx.HTTPError as error:
            raise UserError(
                f"the SuperLink at {self.address} does not answer ({one_line(error)}); start "
                "bin/start-superlink, or its unit, and try again."
            ) from None


@contextmanager
def control_api(folder: Path) -> Iterator[ControlApi]:
    """The Control API of the server whose folder this is, from ``flwr/config.toml``.

    Raises:
        UserError: the folder's own files do not say where the SuperLink is.
    """
    file = folder / "flwr" / "config.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))["superlink"]
        connection = table[table["default"]]
        address = connection["address"]
        insecure = bool(connection.get("insecure", False))
        roots = None if insecure else Path(connection["root-certificates"]).read_bytes()
    except OSError as error:
        raise UserError(f"'{error.filename}' cannot be read: {error.strerror}.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{file}' names no SuperLink: {one_line(error)}.") from None
    client = ControlHttpClient.from_server_address(
        server_address=address, insecure=insecure, root_certificates=roots, interceptors=[]
    )
    try:
        yield ControlApi(client, address)
    finally:
        client.close()
