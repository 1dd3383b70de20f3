"""What a server shows of itself before anything is sent to it, and whether it may be trusted.

The verdict is OpenSSL's, on a handshake with the trust that the caller names. ``cryptography``
reads the certificates only to say in a sentence what is wrong and whose mistake it may be: the
chain, the dates, the names (RFC 5280, RFC 9525).
"""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from flexlora.deploy.connections import SECONDS, Stopped, ask, connect, is_own, reason, spelled
from flexlora.deploy.doctor import Finding, failed, ok, warning
from flexlora.units import human_seconds

__all__ = ["Authorities", "Shown", "check_certificate", "look", "read_authorities"]

SOON = 14 * 86400.0  # seconds before the end of a certificate from which on it is worth a word
LONGEST = 80  # characters of a name that are told
# X509_V_ERR_* of OpenSSL's x509_vfy.h
OUT_OF_TIME = {9, 10}
OTHER_NAME = {62, 64}
NAME = "certificate"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What was seen at an address: a certificate, or none where it speaks plain HTTP."""

    certificate: x509.Certificate | None
    own: bool


@dataclass(frozen=True, kw_only=True)
class Authorities:
    """Whom a person trusts: a file of certificates, as text and one by one."""

    path: Path
    text: str
    certificates: tuple[x509.Certificate, ...]

    def context(self) -> ssl.SSLContext:
        """Trust in these and in nobody else, as a SuperNode has it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.text)
        return context


def look(host: str, port: int) -> Shown:
    """Connect and shake hands without trusting anybody; nothing is sent over it.

    Raises:
        Stopped: no connection, or neither TLS nor HTTP is spoken there.
    """
    blind = _blind()
    with connect(host, port) as plain:
        own = is_own(plain.getpeername()[0])
        try:
            with blind.wrap_socket(plain, server_hostname=host) as secured:
                shown = secured.getpeercert(binary_form=True) or b""
        except OSError as error:
            no_tls: OSError = error
        else:
            return Shown(certificate=x509.load_der_x509_certificate(shown), own=own)
    try:
        ask(host, port, "GET", "/health", context=None)
    except (OSError, http.client.HTTPException) as error:
        raise Stopped(_speechless(host, port, no_tls, error)) from None
    return Shown(certificate=None, own=own)


def _blind() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _speechless(host: str, port: int, no_tls: OSError, no_http: Exception) -> Finding:
    address = spelled(host, port)
    remedy = f"ss -ltnp 'sport = :{port}' (on the server: what listens there?)"
    if isinstance(no_tls, TimeoutError) and isinstance(no_http, TimeoutError):
        told = f"takes connections and says nothing within {SECONDS:g} seconds"
    else:
        causes = f"TLS: {reason(no_tls)}; HTTP: {reason(no_http)}"
        told = f"takes connections and speaks neither TLS nor HTTP ({causes})"
    return failed(f"{address} {told}.", remedy)


def read_authorities(path: Path) -> Authorities:
    """The certificates in ``path``.

    Raises:
        Stopped: no file, nothing in PEM, a private key, no authority among them.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        told = f"the root certificates '{path}' cannot be read: {reason(error)}."
        raise Stopped(failed(told, f"ls -l '{path}'", name=NAME)) from None
    if b"PRIVATE KEY-----" in data:
        told = f"'{path}' holds a private key, which is for the server alone: do not hand it on."
        raise Stopped(failed(told, f"openssl x509 -in '{path}' -out ca.pem", name=NAME))
    try:
        text = data.decode("ascii")
        certificates = tuple(x509.load_pem_x509_certificates(data))
    except ValueError:
        told = f"'{path}' holds no certificate in PEM (text between BEGIN and END CERTIFICATE)."
        remedy = f"openssl x509 -inform der -in '{path}' -out ca.pem"
        raise Stopped(failed(told, remedy, name=NAME)) from None
    if not any(_may_sign(certificate) for certificate in certificates):
        first = certificates[0]
        told = (
            f"'{path}' is no authority's: it is the certificate of {named(first.subject)}, "
            f"signed by {named(first.issuer)}; give that one's."
        )
        raise Stopped(failed(told, f"openssl x509 -noout -text -in '{path}'", name=NAME))
    return Authorities(path=path, text=text, certificates=certificates)


def _may_sign(certificate: x509.Certificate) -> bool:
    """An authority, or a certificate that stands for itself and may be trusted alone."""
    if certificate.issuer == certificate.subject:
        return True
    try:
        return bool(certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except (x509.ExtensionNotFound, ValueError):
        return False


def check_certificate(
    host: str,
    port: int,
    certificate: x509.Certificate,
    context: ssl.SSLContext,
    authorities: Authorities | None,
) -> Finding:
    """A handshake with ``context``'s trust, where ``host`` must be in the certificate.

    Raises:
        Stopped: it is not trusted, and why.
    """
    address = spelled(host, port)
    try:
        with connect(host, port) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
            version = tls.version()
    except ssl.SSLCertVerificationError as error:
        raise Stopped(_explained(error, host, port, certificate, authorities)) from None
    except OSError as error:
        told = f"{address} breaks off the TLS handshake: {reason(error)}."
        remedy = f"openssl s_client -connect {address} -brief"
        raise Stopped(failed(told, remedy, name=NAME)) from None
    left = certificate.not_valid_after_utc.timestamp() - time.time()
    seen = f"signed by {named(certificate.issuer)}, for {_names(certificate)}"
    if left < SOON:
        told = f"the certificate of {address} ends in {human_seconds(left)}; it is {seen}."
        return warning(told, _another(host), name=NAME)
    return ok(f"{seen}, until {certificate.not_valid_after_utc:%Y-%m-%d} ({version})", name=NAME)


def _explained(
    error: ssl.SSLCertVerificationError,
    host: str,
    port: int,
    certificate: x509.Certificate,
    authorities: Authorities | None,
) -> Finding:
    if error.verify_code in OUT_OF_TIME:
        trusted = authorities.certificates if authorities else ()
        return _out_of_time(host, port, (certificate, *trusted))
    if error.verify_code in OTHER_NAME:
        told = (
            f"'{host}' is not among the names of the certificate of {spelled(host, port)}: it is "
            f"for {_names(certificate)}."
        )
        return failed(told, _another(host), name=NAME)
    return _unknown_signer(error, host, port, certificate, authorities)


def _unknown_signer(
    error: ssl.SSLCertVerificationError,
    host: str,
    port: int,
    certificate: x509.Certificate,
    authorities: Authorities | None,
) -> Finding:
    signer, address = certificate.issuer, spelled(host, port)
    whose = "itself" if signer == certificate.subject else named(signer)
    told = f"the certificate of {address} is signed by {whose}"
    if authorities is None:
        again = f"flexlora doctor --superlink {address} --root-certificates CA.pem"
        return failed(f"{told}, whom this machine does not trust by itself.", again, name=NAME)
    remedy = (
        f"openssl x509 -noout -subject -fingerprint -sha256 -in '{authorities.path}' (here, there)"
    )
    if any(signer == known.subject for known in authorities.certificates):
        told += f", and '{authorities.path}' has one of that name with which it does not verify"
    else:
        known = ", ".join(named(known.subject) for known in authorities.certificates[:3])
        told += f", and '{authorities.path}' holds {known}"
    return failed(f"{told} ({error.verify_message}).", remedy, name=NAME)


def _out_of_time(host: str, port: int, certificates: Sequence[x509.Certificate]) -> Finding:
    """Expired or not yet valid; the server's clock says whether ours is to blame."""
    here = time.time()
    for certificate in certificates:
        first, last = _validity(certificate)
        if not first <= here <= last:
            break
    whose = "certificate" if certificate is certificates[0] else "authority"
    when = (
        f"is valid from {_day(first)}, {human_seconds(first - here)} ahead"
        if here < first
        else f"ended on {_day(last)}, {human_seconds(here - last)} ago"
    )
    told = f"the {whose} of {spelled(host, port)} {when}"
    there = _their_time(host, port)
    if there is None:
        told += f", if this machine's clock ({_day(here)}) is right"
    elif first <= there <= last:
        told += f"; the server's clock says {_day(there)}, so this machine's clock is wrong"
        return failed(f"{told}.", "timedatectl set-ntp true", name=NAME)
    else:
        told += ", by the server's clock too"
    return failed(f"{told}.", _another(host), name=NAME)


def _their_time(host: str, port: int) -> float | None:
    """The server's clock, asked for without trust in it: it only helps to say what is likely."""
    try:
        return ask(host, port, "GET", "/health", context=_blind()).date
    except (OSError, http.client.HTTPException):
        return None


def _validity(certificate: x509.Certificate) -> tuple[float, float]:
    return (
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


def _another(host: str) -> str:
    return f"flexlora server init DIR --host {host} (on the server: makes another)"


def _names(certificate: x509.Certificate) -> str:
    """What a certificate's subjectAltName holds."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return f"no name (it has no subjectAltName; its subject is {named(certificate.subject)})"
    names = [
        *found.get_values_for_type(x509.DNSName),
        *map(str, found.get_values_for_type(x509.IPAddress)),
    ]
    return _printable(", ".join(names[:8]) + (" ..." if len(names) > 8 else "")) or "no host"


def named(name: x509.Name) -> str:
    """A certificate's subject or issuer, in quotes."""
    return f"'{_printable(name.rfc4514_string())[:LONGEST]}'"


def _printable(text: str) -> str:
    """Names come from the other side: nothing in them may steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
