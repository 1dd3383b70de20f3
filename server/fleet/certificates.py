"""``flexlora fleet rotate --certificates`` and ``--authority``: how nodes know the server.

The authority (``ca.crt``) signs the server's certificate, and every node has a copy. A new one is
introduced with an overlap: first it stands beside the old one in ``ca.crt``, and nodes fetch that
(``flexlora client trust``); when all have it, the server gets a certificate signed by the new one;
then the old one goes.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flexlora.deploy.certificates import (
    Issued,
    alternative_names,
    make_authority,
    make_server,
    read_authorities,
)
from flexlora.deploy.folder import SECRET
from flexlora.deploy.hosts import parse_host
from flexlora.errors import UserError
from flexlora.wire.files import sync_folder

__all__ = ["AUTHORITY_CHOICES", "AUTHORITY_DAYS", "change_authority", "renew", "signer_of"]

AUTHORITY_DAYS = 3650
NEW, ONLY = "new", "only"
AUTHORITY_CHOICES = (NEW, ONLY)
RESTART = "Restart the SuperLink and the proxy, which have read the old one"


def renew(folder: Path, days: int) -> str:
    """A new key and certificate of the server for the same names; what is to be done, in words.

    Raises:
        UserError: more days than the authority has left, or its key is not here.
    """
    authority = _authority(folder)
    left = (authority.certificate.not_valid_after_utc - datetime.now(UTC)).days
    if not 1 <= days <= left:
        raise UserError(f"--days is {days}, expected 1 to {left}: then the authority itself ends.")
    before = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    hosts = [parse_host(name, "the certificate's name") for name in alternative_names(before)]
    server = make_server(authority, hosts, days=days)
    _replace(folder / "tls" / "server.key", server.key_pem, SECRET)
    _replace(folder / "server.crt", server.certificate_pem, 0o644)
    ends = server.certificate.not_valid_after_utc
    return (
        f"{folder}/server.crt is new, until {ends:%Y-%m-%d}, for {', '.join(h.text for h in hosts)}"
        f". {RESTART}; nodes need nothing. Take private/ca.key off this machine again."
    )


def change_authority(folder: Path, choice: str) -> str:
    """``new``: one more authority in ``ca.crt``; ``only``: none but the server's signer.

    Raises:
        UserError: the server's certificate is signed by none of them.
    """
    known = read_authorities(folder / "ca.crt").certificates
    signer = signer_of(folder)
    if choice == ONLY:
        _replace(folder / "ca.crt", _pem([signer]), 0o644)
        return (
            f"{folder}/ca.crt has one authority, and {len(known) - 1} are gone. Nodes forget them "
            "with `flexlora client trust`."
        )
    name = signer.subject.rfc4514_string().removeprefix("CN=")
    authority = make_authority(name[:64], days=AUTHORITY_DAYS)
    valid = [each for each in known if each.not_valid_after_utc > datetime.now(UTC)]
    _replace(folder / "private" / "ca.key", authority.key_pem, SECRET)
    _replace(folder / "ca.crt", _pem([*valid, authority.certificate]), 0o644)
    return (
        f"{folder}/ca.crt has {len(valid) + 1} authorities, and private/ca.key is the new one's. "
        "The server's certificate is still signed by the old one. Now every node runs `flexlora "
        "client trust` (its README has the line) and restarts its SuperNode; when all have done "
        "so: `flexlora fleet rotate --certificates`, and at last `--authority only`."
    )


def signer_of(folder: Path) -> x509.Certificate:
    """The authority in ``ca.crt`` that has signed the server's certificate.

    Raises:
        UserError: none of them has.
    """
    leaf = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    for authority in read_authorities(folder / "ca.crt").certificates:
        try:
            leaf.verify_directly_issued_by(authority)
            return authority
        except (ValueError, TypeError, InvalidSignature):
            continue
    raise UserError(
        f"no authority in '{folder}/ca.crt' has signed '{folder}/server.crt'; `flexlora fleet "
        "rotate --certificates` makes a new one."
    )


def _authority(folder: Path) -> Issued:
    """The authority whose key is in ``private/ca.key``."""
    file = folder / "private" / "ca.key"
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except OSError as error:
        raise UserError(
            f"'{file}' cannot be read: {error.strerror}; put the authority's key back there for as "
            "long as this takes."
        ) from None
    except (ValueError, TypeError):
        raise UserError(f"'{file}' is no private key in PEM without a password.") from None
    for certificate in read_authorities(folder / "ca.crt").certificates:
        if isinstance(key, ec.EllipticCurvePrivateKey) and (
            certificate.public_key() == key.public_key()
        ):
            return Issued(certificate=certificate, key=key)
    raise UserError(f"'{file}' is the key of no authority in '{folder}/ca.crt'.")


def _pem(certificates: list[x509.Certificate]) -> bytes:
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Rename a synced file over ``path``; a secret is its owner's from its first byte on."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SECRET)
        with os.fdopen(number, "wb") as out:
            out.write(data)
            os.fchmod(number, mode)
            out.flush()
            os.fsync(number)
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror}; use sudo?") from None
