"""Whether a SuperLink has a node's key registered, asked without changing anything there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from flexlora.deploy.connections import Link, Stopped, reason
from flexlora.deploy.doctor import Finding, failed, ok, warning

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["check_node_key", "read_key"]

NAME = "node key"


def check_node_key(link: Link, path: Path) -> Finding:
    """Whether the SuperLink behind ``link`` knows the key in ``path``.

    Raises:
        Stopped: the file holds no key of a node.
    """
    from flexlora.clients.setup.flower_private import (
        BAD_HEARTBEAT,
        NOT_ACTIVATED,
        activation_that_is_refused,
    )

    headers, body = activation_that_is_refused(read_key(path), time.time())
    answer = link.ask("POST", "/v1/fleet/activate-node", headers, body)
    if answer.code == BAD_HEARTBEAT and path.stat().st_mode & 0o077:
        message = f"the key in '{path}' is registered, and others on this machine may read it."
        return warning(message, f"chmod 600 '{path}'", name=NAME)
    if answer.code == BAD_HEARTBEAT:
        return ok(f"the key in '{path}' is registered", name=NAME)
    if answer.code == NOT_ACTIVATED:
        message = (
            f"{link.address} does not know the key in '{path}': it is not registered, or the "
            "SuperLink runs without --enable-supernode-auth."
        )
        return failed(message, f"flexlora fleet add NAME '{path}.pub' (on the server)", name=NAME)
    if answer.status == 401:
        message = f"{link.address} refuses what '{path}' signs: the clocks differ by too much."
        return failed(message, "timedatectl set-ntp true (here or on the server)", name=NAME)
    message = f"{link.address} does not say whether it knows the key in '{path}' ({answer.status})."
    return warning(message, "flexlora fleet list (on the server)", name=NAME)


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A node's private key, as ``flower-supernode --auth-supernode-private-key`` takes it.

    Raises:
        Stopped: no file, no private key, a passphrase, another kind of key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    new_key = "ssh-keygen -t ecdsa -b 256 -N '' -f node-key"
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        message = f"the node key '{path}' cannot be read: {reason(error)}."
        raise Stopped(failed(message, f"ls -l '{path}'", name=NAME)) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        message = f"'{path}' is no private key in OpenSSH's format, or it has a passphrase."
        raise Stopped(failed(message, new_key, name=NAME)) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        message = f"'{path}' is not on a NIST curve, which Flower requires of a node key."
        raise Stopped(failed(message, new_key, name=NAME))
    return key
