"""The part of ``flexlora doctor`` that needs Flower itself: its version, and a message."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from flexlora.config.resolve import Config
from flexlora.deploy.doctor import Finding, failed, ok
from flexlora.errors import one_line

if TYPE_CHECKING:
    from flexlora.wire.jobs import Capability

__all__ = ["check_flower"]


def check_flower() -> Finding:
    """The version that this FlexLoRA was made for, and a query that comes back as it was sent."""
    from packaging.requirements import Requirement

    needed = next(
        requirement
        for requirement in map(Requirement, metadata.requires("flexlora") or ())
        if requirement.name == "flwr" and not requirement.extras
    )
    remedy = f"pip install '{needed.name}{needed.specifier}'"
    try:
        version = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        return failed("Flower is not installed.", remedy)
    if version not in needed.specifier:
        return failed(f"Flower {version} is installed, expected {needed.specifier}.", remedy)
    try:
        back = _round_trip()
    except Exception as error:  # whatever a half-installed Flower raises
        return failed(f"a message does not come back: {one_line(error).rstrip('.')}.", remedy)
    if back != _capability():
        return failed("a message comes back changed.", remedy)
    return ok(f"{version}, a message went there and back")


def _capability() -> Capability:
    from flexlora.wire.jobs import Capability

    return Capability(
        client_id="doctor",
        num_examples=3,
        device="cpu",
        modules=("a", "b"),
        out_features=(4, 5),
        in_features=(6, 7),
    )


class _QueriedWorker:
    """The part of a worker that ``InProcessGrid`` needs for a capability query."""

    client_ids = ("doctor",)
    personal = None

    def __init__(self) -> None:
        self.config = Config()  # imports the default method's file, and so torch

    def capability(self, client_id: str, *, probed: bool = True) -> Capability:
        return _capability()


def _round_trip() -> Capability:
    from flwr.app import Message, MessageType, RecordDict

    from flexlora.server.transport.messages import decode_capability
    from flexlora.simulations.engine.cohorts import CohortLimits
    from flexlora.simulations.engine.grid import InProcessGrid

    worker: Any = _QueriedWorker()
    grid = InProcessGrid(worker, limits=CohortLimits(clients=1), wire_dtype="float32")
    query = Message(RecordDict(), dst_node_id=1, message_type=MessageType.QUERY)
    (reply,) = grid.pull_messages(grid.push_messages([query]))
    return decode_capability(reply)
