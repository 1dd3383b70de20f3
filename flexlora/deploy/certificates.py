"""Make and read certificates: a federation's authority and its server (RFC 5280).

The authority signs one certificate, the server's; nodes have keys (``node_keys.py``) and need none.
The server's names are subjectAltNames, the only ones that clients read (RFC 9525). The extensions
are those that OpenSSL's strict mode requires.
"""

from __future__ import annotations

import ipaddress
import ssl
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

__all__ = [
    "Authorities",
    "AuthoritiesRefused",
    "Issued",
    "alternative_names",
    "make_authority",
    "make_server",
    "printable",
    "quoted",
    "read_authorities",
]

SKEW = timedelta(days=1)  # for nodes whose clock is behind
LONGEST = 80  # characters of a name that are printed
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
        """The certificate, which is public."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The private key in PKCS #8, not encrypted: a server starts unattended."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def make_authority(name: str, *, days: int) -> Issued:
    """A self-signed authority that may sign servers and no authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    built = (
        _builder(subject, subject, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    )
    return Issued(certificate=built.sign(key, hashes.SHA384()), key=key)


def make_server(authority: Issued, hosts: Sequence[Host], *, days: int) -> Issued:
    """A server's certificate for ``hosts`` and the loopback names."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *HERE])]
    # A common name has 64 characters at most, and clients ignore it.
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
    """A certificate's DNS names and IP addresses."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


@dataclass(frozen=True, kw_only=True)
class Authorities:
    """The trusted certificates of one PEM file."""

    path: Path
    pem: bytes
    certificates: tuple[x509.Certificate, ...]

    def context(self) -> ssl.SSLContext:
        """TLS that trusts these and no others, as a SuperNode's does."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.pem.decode("ascii"))
        return context

    def check_dates(self) -> None:
        """Refuse certificates that are expired or not valid yet.

        Raises:
            UserError: with the date.
        """
        now, what = datetime.now(UTC), f"--root-certificates '{self.path}'"
        for certificate in self.certificates:
            start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            if now > end:
                raise UserError(
                    f"{what} expired on {end:%Y-%m-%d}; ask the server's owner for the new ca.crt."
                )
            if now < start:
                moment = f"{start:%Y-%m-%d %H:%M} UTC"
                raise UserError(f"{what} is not valid before {moment}; set this machine's clock.")


class AuthoritiesRefused(UserError):
    """A file that cannot serve as root certificates; ``remedy`` is a command."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(f"--root-certificates '{path}' {problem}")
        self.remedy = remedy


def read_authorities(path: Path) -> Authorities:
    """The certificates in a PEM file of root certificates.

    Raises:
        AuthoritiesRefused: no such file, no certificate in PEM, a private key, no authority among
            the certificates (one that signed itself counts).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        problem = (
            f"cannot be read: {error.strerror or error}; copy ca.crt from the server's folder."
        )
        raise AuthoritiesRefused(path, problem, f"ls -l '{path}'") from None
    if b"PRIVATE KEY-----" in data:
        problem = "holds a private key, which is for the server alone: do not hand it on."
        raise AuthoritiesRefused(path, problem, f"openssl x509 -in '{path}' -out ca.pem")
    try:
        certificates = tuple(x509.load_pem_x509_certificates(data))
    except ValueError:
        problem = (
            "holds no certificate in PEM (text between BEGIN and END CERTIFICATE); copy ca.crt "
            "from the server's folder."
        )
        remedy = f"openssl x509 -inform der -in '{path}' -out ca.pem"
        raise AuthoritiesRefused(path, problem, remedy) from None
    if not any(map(_may_sign, certificates)):
        subject, issuer = quoted(certificates[0].subject), quoted(certificates[0].issuer)
        problem = (
            f"is no authority's: it is the certificate of {subject}, signed by {issuer}; copy that "
            "one's (ca.crt, not server.crt)."
        )
        raise AuthoritiesRefused(path, problem, f"openssl x509 -noout -text -in '{path}'")
    return Authorities(path=path, pem=data, certificates=certificates)


def _may_sign(certificate: x509.Certificate) -> bool:
    """An authority, or a self-signed certificate, which may be trusted alone."""
    if certificate.issuer == certificate.subject:
        return True
    try:
        return bool(certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except (x509.ExtensionNotFound, ValueError):
        return False


def quoted(name: x509.Name) -> str:
    """A certificate's subject or issuer in quotes, safe to print on a terminal."""
    return f"'{printable(name.rfc4514_string())[:LONGEST]}'"


def printable(text: str) -> str:
    """``text`` from another machine, with ``?`` for whatever could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


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
