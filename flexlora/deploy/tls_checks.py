"""Check a server's certificate by a TLS handshake, and say what is wrong with it.

OpenSSL decides, with the trust that the caller names. ``cryptography`` reads the certificates only
to explain a refusal: the chain, the dates, the names (RFC 5280, RFC 9525).
"""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from flexlora.deploy.certificates import Authorities, printable, quoted
from flexlora.deploy.connections import SECONDS, Stopped, connect, is_loopback, reason, request
from flexlora.deploy.doctor import Finding, failed, ok, warning
from flexlora.deploy.hosts import join_address

__all__ = ["Endpoint", "check_certificate", "inspect_endpoint", "span"]

SOON = 14 * 86400.0  # seconds before a certificate's end in which doctor warns
# X509_V_ERR_* of OpenSSL's x509_vfy.h
OUT_OF_TIME = {9, 10}
OTHER_NAME = {62, 64}
NAME = "certificate"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What listens at an address; without a certificate it speaks plain HTTP."""

    certificate: x509.Certificate | None
    is_loopback: bool


def inspect_endpoint(host: str, port: int) -> Endpoint:
    """Connect and shake hands without verification; no request is sent over TLS.

    Raises:
        Stopped: no connection, or neither TLS nor HTTP is spoken there.
    """
    unverified = _unverified()
    with connect(host, port) as plain:
        local = is_loopback(plain.getpeername()[0])
        try:
            with unverified.wrap_socket(plain, server_hostname=host) as secured:
                der = secured.getpeercert(binary_form=True) or b""
        except OSError as error:
            no_tls: OSError = error
        else:
            return Endpoint(certificate=x509.load_der_x509_certificate(der), is_loopback=local)
    try:
        request(host, port, "GET", "/health", context=None)
    except (OSError, http.client.HTTPException) as error:
        raise Stopped(_unknown_protocol(host, port, no_tls, error)) from None
    return Endpoint(certificate=None, is_loopback=local)


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _unknown_protocol(host: str, port: int, no_tls: OSError, no_http: Exception) -> Finding:
    address = join_address(host, port)
    remedy = f"ss -ltnp 'sport = :{port}' (on the server: what listens there?)"
    if isinstance(no_tls, TimeoutError) and isinstance(no_http, TimeoutError):
        message = f"takes connections and says nothing within {SECONDS:g} seconds"
    else:
        causes = f"TLS: {reason(no_tls)}; HTTP: {reason(no_http)}"
        message = f"takes connections and speaks neither TLS nor HTTP ({causes})"
    return failed(f"{address} {message}.", remedy)


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
    address = join_address(host, port)
    try:
        with connect(host, port) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
            version = tls.version()
    except ssl.SSLCertVerificationError as error:
        raise Stopped(_explained(error, host, port, certificate, authorities)) from None
    except OSError as error:
        message = f"{address} breaks off the TLS handshake: {reason(error)}."
        remedy = f"openssl s_client -connect {address} -brief"
        raise Stopped(failed(message, remedy, name=NAME)) from None
    left = certificate.not_valid_after_utc.timestamp() - time.time()
    seen = f"signed by {quoted(certificate.issuer)}, for {_names(certificate)}"
    if left < SOON:
        message = f"the certificate of {address} ends in {span(left)}; it is {seen}."
        return warning(message, _reissue(host), name=NAME)
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
        message = (
            f"'{host}' is not among the names of the certificate of {join_address(host, port)}: it "
            f"is for {_names(certificate)}."
        )
        return failed(message, _reissue(host), name=NAME)
    return _unknown_signer(error, host, port, certificate, authorities)


def _unknown_signer(
    error: ssl.SSLCertVerificationError,
    host: str,
    port: int,
    certificate: x509.Certificate,
    authorities: Authorities | None,
) -> Finding:
    signer, address = certificate.issuer, join_address(host, port)
    whose = "itself" if signer == certificate.subject else quoted(signer)
    message = f"the certificate of {address} is signed by {whose}"
    if authorities is None:
        again = f"flexlora doctor --superlink {address} --root-certificates CA.pem"
        return failed(f"{message}, whom this machine does not trust by itself.", again, name=NAME)
    remedy = (
        f"openssl x509 -noout -subject -fingerprint -sha256 -in '{authorities.path}' (here, there)"
    )
    if any(signer == known.subject for known in authorities.certificates):
        message += f", and '{authorities.path}' has one of that name with which it does not verify"
    else:
        known = ", ".join(quoted(known.subject) for known in authorities.certificates[:3])
        message += f", and '{authorities.path}' holds {known}"
    return failed(f"{message} ({error.verify_message}).", remedy, name=NAME)


def _out_of_time(host: str, port: int, certificates: Sequence[x509.Certificate]) -> Finding:
    """Expired or not yet valid; the server's clock tells whether ours is wrong."""
    here = time.time()
    for certificate in certificates:
        first, last = _validity(certificate)
        if not first <= here <= last:
            break
    whose = "certificate" if certificate is certificates[0] else "authority"
    when = (
        f"is valid from {_day(first)}, {span(first - here)} ahead"
        if here < first
        else f"ended on {_day(last)}, {span(here - last)} ago"
    )
    message = f"the {whose} of {join_address(host, port)} {when}"
    there = _their_time(host, port)
    if there is None:
        message += f", if this machine's clock ({_day(here)}) is right"
    elif first <= there <= last:
        message += f"; the server's clock says {_day(there)}, so this machine's clock is wrong"
        return failed(f"{message}.", "timedatectl set-ntp true", name=NAME)
    else:
        message += ", by the server's clock too"
    return failed(f"{message}.", _reissue(host), name=NAME)


def _their_time(host: str, port: int) -> float | None:
    """The server's clock over unverified TLS; it only serves to explain a refusal."""
    try:
        return request(host, port, "GET", "/health", context=_unverified()).date
    except (OSError, http.client.HTTPException):
        return None


def _validity(certificate: x509.Certificate) -> tuple[float, float]:
    return (
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


def _reissue(host: str) -> str:
    return f"flexlora server init DIR --host {host} (on the server: makes another)"


def _names(certificate: x509.Certificate) -> str:
    """A certificate's subjectAltNames, the first eight."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return f"no name (it has no subjectAltName; its subject is {quoted(certificate.subject)})"
    names = [
        *found.get_values_for_type(x509.DNSName),
        *map(str, found.get_values_for_type(x509.IPAddress)),
    ]
    return printable(", ".join(names[:8]) + (" ..." if len(names) > 8 else "")) or "no host"


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def span(seconds: float) -> str:
    """A duration in its largest whole unit."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    unit, length = next((u for u in units if abs(seconds) >= u[1]), units[-1])
    count = round(abs(seconds) / length)
    return f"{count} {unit}{'' if count == 1 else 's'}"
