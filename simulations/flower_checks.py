"""The part of ``flexlora doctor`` that needs Flower: its version, a message, a SuperLink."""

from __future__ import annotations

import http.client
import socket
import ssl
from importlib import metadata
from typing import TYPE_CHECKING, Any

from flexlora.doctor import Finding, failed, ok
from flexlora.errors import UserError, told

if TYPE_CHECKING:
    from flexlora.jobs import Capability

__all__ = ["check_flower", "check_superlink", "parse_address"]

TIMEOUT = 5.0


def check_flower() -> Finding:
    """The version that this FlexLoRA was made for, and a query that comes back as it was sent."""
    from packaging.requirements import Requirement

    needed = next(
        requirement
        for requirement in map(Requirement, metadata.requires("flexlora") or ())
        if requirement.name == "flwr" and not requirement.extras
    )
    mend = f"pip install '{needed.name}{needed.specifier}'"
    try:
        version = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        return failed("Flower is not installed.", mend)
    if version not in needed.specifier:
        return failed(f"Flower {version} is installed, expected {needed.specifier}.", mend)
    try:
        back = _round_trip()
    except Exception as error:  # whatever a half-installed Flower raises
        return failed(f"a message does not come back: {told(error).rstrip('.')}.", mend)
    if back != _asked():
        return failed("a message comes back changed.", mend)
    return ok(f"{version}, a message went there and back")


def _asked() -> Capability:
    from flexlora.jobs import Capability

    return Capability(
        client_id="doctor",
        num_examples=3,
        device="cpu",
        modules=("a", "b"),
        out_features=(4, 5),
        in_features=(6, 7),
    )


class _Answering:
    """What an ``InProcessGrid`` asks of a worker that is only queried."""

    client_ids = ("doctor",)

    def capability(self, client_id: str) -> Capability:
        return _asked()


def _round_trip() -> Capability:
    from flexlora.server.messages import decode_capability
    from flexlora.simulations.cohorts import CohortLimits
    from flexlora.simulations.engine import InProcessGrid
    from flwr.app import Message, MessageType, RecordDict

    worker: Any = _Answering()
    grid = InProcessGrid(worker, limits=CohortLimits(clients=1), wire_dtype="float32")
    query = Message(RecordDict(), dst_node_id=1, message_type=MessageType.QUERY)
    (reply,) = grid.pull_messages(grid.push_messages([query]))
    return decode_capability(reply)


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, or ``[::1]:PORT``.

    Raises:
        UserError: no host, or a port that is none.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--superlink is '{text}', expected HOST:PORT such as '10.0.0.1:8000'.")
    return host.strip("[]"), int(port)


def check_superlink(address: str) -> Finding:
    """A connection, and an answer to ``GET /health`` with or without TLS.

    The certificate is not checked here: nothing is sent that anybody could want.
    """
    host, port = parse_address(address)
    try:
        socket.create_connection((host, port), timeout=TIMEOUT).close()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        return failed(f"{address} cannot be reached: {reason}.", f"nc -vz {host} {port}")
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    told = []
    for scheme, connection in (
        ("TLS", http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=unchecked)),
        ("plain HTTP", http.client.HTTPConnection(host, port, timeout=TIMEOUT)),
    ):
        try:
            connection.request("GET", "/health")
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            told.append(f"{scheme}: {str(error) or type(error).__name__}")
            continue
        finally:
            connection.close()
        if status == 200:
            return ok(f"{address} answers over {scheme}")
        told.append(f"{scheme}: status {status}")
    return failed(
        f"{address} takes connections and does not answer as a SuperLink does ({'; '.join(told)}).",
        "flower-superlink --help (is this its --host and --port?)",
    )
