"""Ask a server to let this node in, knowing nothing of it but a token.

The first request goes out over TLS that trusts nobody: it fetches the authority's certificates,
which are no secret, and only the one whose SHA-256 the token names is taken. Every other request is
made over TLS that trusts this one alone and checks the server's name; only then the secret is sent.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_ssh_private_key

import flexlora
from flexlora.deploy.certificates import printable
from flexlora.deploy.connections import Link, reason
from flexlora.deploy.invitation import (
    AUTHORITY_PATH,
    ENROLL_PATH,
    REFUSED,
    Token,
    signed_part,
)
from flexlora.errors import UserError

__all__ = ["NotNow", "ask", "fetch_authority"]

LONGEST = 400  # characters of a server's sentence


class NotNow(UserError):
    """The server cannot be reached, or cannot decide now: the same request may succeed later."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The server's answer; ``authorities`` are its current certificates in PEM."""

    state: str
    sentence: str
    name: str
    authorities: bytes


def fetch_authority(token: Token) -> bytes:
    """The authority's certificate in PEM that the token names.

    Raises:
        NotNow: no answer.
        UserError: another authority than the token's, or no enrolment there.
    """
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    status, body = _request(token, blind, "GET", AUTHORITY_PATH)
    if status != 200:
        raise _no_enrolment(token, status)
    try:
        certificates = x509.load_pem_x509_certificates(body)
    except ValueError:
        certificates = []
    for certificate in certificates:
        if sha256(certificate.public_bytes(Encoding.DER)).digest() == token.authority:
            return certificate.public_bytes(Encoding.PEM)
    raise UserError(
        f"{token.superlink} shows another authority than the token names: another server answers "
        "there, or the server's folder was made anew. Nothing was sent; ask for a new token."
    )


def ask(
    token: Token,
    authority: bytes,
    *,
    name: str = "",
    public_key: str = "",
    private_key: bytes = b"",
) -> Answered:
    """Enrol a key under a name or ask for its state; without a key: is the token good?

    Raises:
        NotNow: no answer, or the server cannot decide now.
        UserError: the server's refusal, in its words.
    """
    trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusted.load_verify_locations(cadata=authority.decode("ascii"))
    request = {
        "invitation": token.invitation,
        "secret": token.secret.hex(),
        "name": name,
        "public_key": public_key,
        "signature": _sign(private_key, token.invitation, name) if private_key else "",
        "version": flexlora.__version__,
    }
    headers = {"Content-Type": "application/json"}
    status, body = _request(
        token, trusted, "POST", ENROLL_PATH, headers, json.dumps(request).encode()
    )
    answer = _parsed(body)
    sentence = printable(str(answer.get("sentence", "")))[:LONGEST]
    if status == 403 and answer.get("state") == REFUSED:
        raise UserError(f"{token.superlink} refuses: {sentence}")
    if status in (429, 503):
        raise NotNow(f"{token.superlink} cannot do it now: {sentence or f'HTTP {status}'}")
    if status != 200:
        raise _no_enrolment(token, status)
    return Answered(
        state=str(answer.get("state", "")),
        sentence=sentence,
        name=printable(str(answer.get("name", ""))),
        authorities=str(answer.get("ca.crt", "")).encode("ascii", "ignore"),
    )


def _request(
    token: Token,
    context: ssl.SSLContext,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
) -> tuple[int, bytes]:
    link = Link(host=token.superlink.host.text, port=token.superlink.port, context=context)
    try:
        response = link.request(method, path, headers, body)
    except ssl.SSLCertVerificationError as error:
        raise UserError(
            f"{token.superlink} shows a certificate that the token's authority does not vouch for: "
            f"{error.verify_message}. Nothing was sent; ask the server's owner."
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise NotNow(f"{token.superlink} does not answer: {reason(error)}.") from None
    return response.status, response.body


def _no_enrolment(token: Token, status: int) -> UserError:
    if status in (502, 503, 504):
        return NotNow(
            f"{token.superlink}: the proxy answers, and the enrolment behind it does not."
        )
    return UserError(
        f"{token.superlink} answers {status} where nodes enrol; the server's folder is older than "
        "enrolment, or something else listens there."
    )


def _sign(private_key: bytes, invitation: str, name: str) -> str:
    key = load_ssh_private_key(private_key, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)  # client_init has made it
    return key.sign(signed_part(invitation, name), ec.ECDSA(hashes.SHA256())).hex()


def _parsed(body: bytes) -> Mapping:
    try:
        read = json.loads(body)
    except ValueError:
        return {}
    return read if isinstance(read, Mapping) else {}
