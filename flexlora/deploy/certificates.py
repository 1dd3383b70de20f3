"""A small certificate authority for one federation, and the certificate of its server (RFC 5280).

One authority signs one certificate, that of the server; nodes are known by their own keys
(``node_keys.py``) and need none. The server's names are subjectAltNames: clients have looked at
nothing else for years (RFC 9525). Extensions are those that OpenSSL's strict mode asks for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flexlora.deploy.hosts import Host
from flexlora.errors import UserError

__all__ = ["Issued", "alternative_names", "make_authority", "make_server", "read_authority"]

SKEW = timedelta(days=1)  # a clock that is behind must not see a certificate of the future
HERE = (
    Host(text="localhost"),
    Host(text="127.0.0.1", address=ipaddress.ip_address("127.0.0.1")),
    Host(text="::1", address=ipaddress.ip_address("::1")),
)
USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """What everybody may read."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """What nobody else may read (PKCS #8, not encrypted: a server starts unattended)."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def make_authority(name: str, *, days: int) -> Issued:
    """A self-signed authority that may sign servers and no further authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    built = (
        _builder(subject, subject, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    )
    return Issued(certificate=built.sign(key, hashes.SHA384()), key=key)


def make_server(authority: Issued, hosts: Sequence[Host], *, days: int) -> Issued:
    """A server's certificate for ``hosts`` and for this machine's own loopback names."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *HERE])]
    # A common name has 64 characters at most, and nobody reads it: the names are below.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FlexLoRA SuperLink")])
    issuer = authority.certificate
    built = (
        _builder(subject, issuer.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
    )
    return Issued(certificate=built.sign(authority.key, hashes.SHA384()), key=key)


def alternative_names(certificate: x509.Certificate) -> list[str]:
    """The names that a certificate is for, DNS names and addresses."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def read_authority(path: str | Path, flag: str) -> bytes:
    """The bytes of a file of authorities' certificates, all of them valid now.

    Raises:
        UserError: no such file, no certificate in it, one that is expired or not valid yet, or one
            that is not an authority's: a SuperNode would refuse every server with it.
    """
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{flag} '{path}' cannot be read: {reason}; copy ca.crt from the server's folder."
        ) from None
    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError:
        raise UserError(
            f"{flag} '{path}' holds no certificate, expected the authority's in PEM; "
            "copy ca.crt from the server's folder."
        ) from None
    for certificate in found:
        _check_authority(certificate, f"{flag} '{path}'")
    return data


def _check_authority(certificate: x509.Certificate, what: str) -> None:
    now = datetime.now(UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise UserError(
            f"{what} expired on {end:%Y-%m-%d}; ask the server's owner for the new ca.crt."
        )
    if now < start:
        raise UserError(
            f"{what} is not valid before {start:%Y-%m-%d %H:%M} UTC; set this machine's clock."
        )
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        is_authority = constraints.ca
    except x509.ExtensionNotFound:
        is_authority = False
    if not is_authority:
        raise UserError(
            f"{what} is the certificate of '{certificate.subject.rfc4514_string()}', which is no "
            "authority, expected the one that signed the server's; copy ca.crt, not server.crt."
        )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*wanted: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in wanted for name in USES})


def _general_name(host: Host) -> x509.GeneralName:
    return x509.IPAddress(host.address) if host.address else x509.DNSName(host.text)
