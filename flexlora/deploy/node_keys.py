"""A node's key pair for Flower's SuperNode authentication.

Flower 1.41 takes keys on a NIST curve in OpenSSH's format: the node signs the time of every request
with the private one, and the server knows the public one from ``flwr supernode register``.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["NodeKeys", "make_node_keys", "make_secret"]


@dataclass(frozen=True, kw_only=True)
class NodeKeys:
    """The private key's file, and the public line for the server."""

    private: bytes
    public: bytes


def make_node_keys(comment: str) -> NodeKeys:
    """A fresh pair on P-384; ``comment`` ends the public line, as ssh-keygen's would."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    line = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return NodeKeys(private=private, public=line + b" " + comment.encode() + b"\n")


def make_secret() -> bytes:
    """The secret by which a SuperExec authenticates to its SuperNode."""
    return secrets.token_hex(32).encode()
