"""A node's key pair for Flower's SuperNode authentication.

Flower 1.41 takes keys on a NIST curve in OpenSSH's format: the node signs the time of every request
with the private one, and the server knows the public one, which an operator registers.
"""

from __future__ import annotations

import secrets
from base64 import b64decode, b64encode
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flexlora.errors import UserError

__all__ = [
    "NodeKeys",
    "PublicKey",
    "fingerprint",
    "make_node_keys",
    "make_secret",
    "parse_public_key",
    "public_key_of_pem",
    "read_public_key",
]

CURVES = (ec.SECP192R1, ec.SECP224R1, ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
LONGEST = 4096  # bytes of a public key's file


@dataclass(frozen=True, kw_only=True)
class NodeKeys:
    """The private key's file, and the public line for the server."""

    private: bytes
    public: bytes


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """A node's public key: ``line`` is OpenSSH's type and base64, ``pem`` what Flower stores."""

    line: str
    pem: bytes

    @property
    def fingerprint(self) -> str:
        """As ``ssh-keygen -l`` prints it: SHA-256 in base64."""
        return fingerprint(self.line)


def fingerprint(line: str) -> str:
    """The fingerprint of an OpenSSH public line."""
    digest = sha256(b64decode(line.split()[1])).digest()
    return "SHA256:" + b64encode(digest).decode().rstrip("=")


def make_node_keys(comment: str) -> NodeKeys:
    """A fresh pair; ``comment`` ends the public line, as ssh-keygen's would.

    On P-256: every request is signed, and P-384 costs the server four times as much.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    line = _line(key.public_key())
    return NodeKeys(private=private, public=line + b" " + comment.encode() + b"\n")


def parse_public_key(data: bytes, what: str) -> PublicKey:
    """The key in the text of a ``.pub`` file; its comment is dropped.

    Raises:
        UserError: a private key, no OpenSSH key, or one of another kind than Flower takes.
    """
    if b"PRIVATE KEY-----" in data:
        raise UserError(f"{what} is a private key, which never leaves its node; give its .pub.")
    try:
        key = serialization.load_ssh_public_key(data[:LONGEST].strip())
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(
            f"{what} is no public key in OpenSSH's form, expected a line that begins with "
            "'ecdsa-sha2-nistp384', as in a node's keys/node.pub."
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVES):
        kind = data.split(maxsplit=1)[0].decode("ascii", "replace")
        raise UserError(
            f"{what} is a key of type '{kind}', expected one on a NIST curve, such as "
            "`ssh-keygen -t ecdsa -b 256` makes."
        )
    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return PublicKey(line=_line(key).decode(), pem=pem)


def public_key_of_pem(pem: bytes) -> PublicKey:
    """The key in the form in which Flower stores it.

    Raises:
        UserError: it is no elliptic-curve key in PEM.
    """
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise UserError("the SuperLink has a node whose public key cannot be read.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UserError("the SuperLink has a node whose public key is of another kind.")
    return PublicKey(line=_line(key).decode(), pem=pem)


def read_public_key(path: Path) -> PublicKey:
    """``parse_public_key`` of a file.

    Raises:
        UserError: it cannot be read, or see there.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    return parse_public_key(data, f"'{path}'")


def make_secret() -> bytes:
    """The secret by which a SuperExec authenticates to its SuperNode."""
    return secrets.token_hex(32).encode()


def _line(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
