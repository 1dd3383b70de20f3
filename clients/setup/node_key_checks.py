"""Whether a SuperLink knows this node's key, asked without changing anything there.

The question is the activation with which a SuperNode begins, signed as a SuperNode signs it, for a
heartbeat that Flower refuses. It looks the key up first, so that the refusal says which it was; the
node is not activated either way.
"""

from __future__ import annotations

import time
from base64 import b64encode
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from flexlora.deploy.connections import Answer, Link, Stopped, reason
from flexlora.deploy.doctor import Finding, failed, ok, warning

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["check_node_key", "read_key"]

NAME = "node key"
BAD_HEARTBEAT = 2003  # Flower's codes for an interval out of bounds
NOT_ACTIVATED = 2004  # and for a node that is not there
NO_HEARTBEAT = 0.0  # seconds; Flower takes 10 to 1800


def check_node_key(link: Link, path: Path) -> Finding:
    """Whether the SuperLink behind ``link`` knows the key in ``path``.

    Raises:
        Stopped: the file holds no key of a node.
    """
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    key = read_key(path)
    public = public_key_to_bytes(key.public_key())
    request = ActivateNodeRequest(public_key=public, heartbeat_interval=NO_HEARTBEAT)
    headers = {"Content-Type": "application/protobuf", **_signed(key, public)}
    return _told(
        link, path, link.post("/v1/fleet/activate-node", headers, request.SerializeToString())
    )


def _told(link: Link, path: Path, answer: Answer) -> Finding:
    if answer.code == BAD_HEARTBEAT and path.stat().st_mode & 0o077:
        told = f"the key in '{path}' is registered, and others on this machine may read the file."
        return warning(told, f"chmod 600 '{path}'", name=NAME)
    if answer.code == BAD_HEARTBEAT:
        return ok(f"the key in '{path}' is registered", name=NAME)
    if answer.code == NOT_ACTIVATED:
        told = (
            f"{link.address} does not know the key in '{path}': it is not registered, or the "
            "SuperLink runs without --enable-supernode-auth."
        )
        return failed(told, f"flwr supernode register '{path}.pub' (on the server)", name=NAME)
    if answer.status == 401:
        told = f"{link.address} refuses what '{path}' signs: the clocks differ by too much."
        return failed(told, "timedatectl set-ntp true (here or on the server)", name=NAME)
    told = f"{link.address} does not say whether it knows the key in '{path}' ({answer.status})."
    return warning(told, "flwr supernode list (on the server)", name=NAME)


def _signed(key: ec.EllipticCurvePrivateKey, public: bytes) -> dict[str, str]:
    """The headers by which a SuperNode proves who it is."""
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.primitives.asymmetric import sign_message

    now = datetime.fromtimestamp(time.time(), UTC).isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, now.encode())).decode(),
        TIMESTAMP_HEADER: now,
    }


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A node's private key, as ``flower-supernode --auth-supernode-private-key`` takes it.

    Raises:
        Stopped: no file, no private key, a passphrase, another kind of key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    another = "ssh-keygen -t ecdsa -b 384 -N '' -f node-key"
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        told = f"the node key '{path}' cannot be read: {reason(error)}."
        raise Stopped(failed(told, f"ls -l '{path}'", name=NAME)) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        told = f"'{path}' is no private key in OpenSSH's format, or it has a passphrase."
        raise Stopped(failed(told, another, name=NAME)) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        told = f"'{path}' is not on one of NIST's elliptic curves, which Flower asks of a node key."
        raise Stopped(failed(told, another, name=NAME))
    return key
