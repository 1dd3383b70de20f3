"""The token by which a node joins a federation, and the request that it makes with it.

A token holds the server's address, the SHA-256 of its authority's certificate and a secret, so that
a node that knows nothing else can tell the right server from any other, and the server a guest from
a stranger. It ends with a checksum: a token that was cut or mistyped is said to be that, and not
taken for a wrong secret.
"""

from __future__ import annotations

import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from hashlib import sha256

from flexlora.deploy.hosts import SuperLink, parse_superlink
from flexlora.errors import UserError

__all__ = [
    "ADMITTED",
    "AUTHORITY_PATH",
    "ENROLL_PATH",
    "PENDING",
    "REFUSED",
    "WELCOME",
    "Token",
    "signed_part",
]

PREFIX = "flexlora1-"
ID_BYTES, SECRET_BYTES, DIGEST_BYTES, CHECK_BYTES = 6, 24, 32, 3
FIXED = ID_BYTES + SECRET_BYTES + DIGEST_BYTES

ENROLL_PATH, AUTHORITY_PATH = "/flexlora/enroll", "/flexlora/ca.crt"
# States in an answer: the token is good; the key waits for an operator; it is in; it is not.
WELCOME, PENDING, ADMITTED, REFUSED = "welcome", "pending", "admitted", "refused"


@dataclass(frozen=True, kw_only=True)
class Token:
    """``authority`` is the SHA-256 of the authority's certificate in DER."""

    invitation: str
    secret: bytes
    authority: bytes
    superlink: SuperLink

    @classmethod
    def make(cls, superlink: SuperLink, authority: bytes) -> Token:
        """A fresh one."""
        return cls(
            invitation=secrets.token_hex(ID_BYTES),
            secret=secrets.token_bytes(SECRET_BYTES),
            authority=authority,
            superlink=superlink,
        )

    @property
    def secret_digest(self) -> str:
        """What the server stores: 192 random bits need no slow hash."""
        return sha256(self.secret).hexdigest()

    def __str__(self) -> str:
        body = bytes.fromhex(self.invitation) + self.secret + self.authority
        body += str(self.superlink).encode()
        return PREFIX + urlsafe_b64encode(body + _check(body)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Token:
        """
        Raises:
            UserError: no token, or one that is not whole.
        """
        text = text.strip()
        if not text.startswith(PREFIX):
            raise UserError(
                f"the token is '{text[:12]}...', expected the line that `flexlora fleet invite` "
                f"has printed, which begins with '{PREFIX}'."
            )
        broken = UserError("the token is not whole: copy the line again, without a line break.")
        try:
            raw = text.removeprefix(PREFIX)
            data = urlsafe_b64decode(raw + "=" * (-len(raw) % 4))
        except ValueError:
            raise broken from None
        body, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
        if len(body) <= FIXED or check != _check(body):
            raise broken
        try:
            address = parse_superlink(body[FIXED:].decode(), "the token's address")
        except UnicodeDecodeError:
            raise broken from None
        return cls(
            invitation=body[:ID_BYTES].hex(),
            secret=body[ID_BYTES : ID_BYTES + SECRET_BYTES],
            authority=body[ID_BYTES + SECRET_BYTES : FIXED],
            superlink=address,
        )


def signed_part(invitation: str, name: str) -> bytes:
    """What a node signs with its key: nobody enrols a key that he does not have."""
    return f"flexlora enrolment {invitation} {name}".encode()


def _check(body: bytes) -> bytes:
    return sha256(b"flexlora token" + body).digest()[:CHECK_BYTES]
