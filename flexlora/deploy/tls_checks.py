"""Check a server's certificate by a TLS handshake, and say what is wrong with it.

OpenSSL decides, with the trust that the caller names. ``cryptography`` reads the certificates only
to explain a refusal: the chain, the dates, the names (RFC 5280, RFC 9525).
"""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from cryptography import x509

from flexlora.deploy.certificates import Authorities, printable, quoted
from flexlora.deploy.connections import SECONDS, Link, Stopped, is_loopback, reason
from flexlora.deploy.doctor import Finding, failed, ok, warning
from flexlora.units import human_seconds

__all__ = ["check_certificate", "inspect_endpoint", "unverified"]

SOON = 14 * 86400.0  # seconds before a certificate's end in which doctor warns
# X509_V_ERR_* of OpenSSL's x509_vfy.h
OUT_OF_TIME = {9, 10}
OTHER_NAME = {62, 64}
NAME = "certificate"


def inspect_endpoint(host: str, port: int) -> Link:
    """Connect and shake hands without verification; no request is sent over TLS.

    Raises:
        Stopped: no connection, or neither TLS nor HTTP is spoken there.
    """
    link = Link(host=host, port=port)
    with link.connect() as plain:
        link = replace(link, is_loopback=is_loopback(plain.getpeername()[0]))
        try:
            with unverified().wrap_socket(plain, server_hostname=host) as secured:
                der = secured.getpeercert(binary_form=True) or b""
        except OSError as error:
            no_tls: OSError = error
        else:
            return replace(link, certificate=x509.load_der_x509_certificate(der))
    try:
        link.request("GET", "/health")
    except (OSError, http.client.HTTPException) as error:
        raise Stopped(_unknown_protocol(link, no_tls, error)) from None
    return link


def unverified() -> ssl.SSLContext:
    """Takes any certificate: to look at one, and to ask an untrusted server's time."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _unknown_protocol(link: Link, no_tls: OSError, no_http: Exception) -> Finding:
    message = f"{link.address} takes connections and "
    if isinstance(no_tls, TimeoutError) and isinstance(no_http, TimeoutError):
        message += f"says nothing within {SECONDS:g} seconds."
    else:
        causes = f"TLS: {reason(no_tls)}; HTTP: {reason(no_http)}"
        message += f"speaks neither TLS nor HTTP ({causes})."
    return failed(message, f"ss -ltnp 'sport = :{link.port}' (on the server: what listens there?)")


def check_certificate(
    link: Link,
    certificate: x509.Certificate,
    context: ssl.SSLContext,
    authorities: Authorities | None,
) -> Finding:
    """A handshake with ``context``'s trust; the certificate must name the link's host.

    Raises:
        Stopped: it is not trusted, and why.
    """
    try:
        with (
            link.connect() as plain,
            context.wrap_socket(plain, server_hostname=link.host) as tls,
        ):
            version = tls.version()
    except ssl.SSLCertVerificationError as error:
        raise Stopped(_refusal(error, link, certificate, authorities)) from None
    except OSError as error:
        message = f"{link.address} breaks off the TLS handshake: {reason(error)}."
        remedy = f"openssl s_client -connect {link.address} -brief"
        raise Stopped(failed(message, remedy, name=NAME)) from None
    left = certificate.not_valid_after_utc.timestamp() - time.time()
    seen = f"signed by {quoted(certificate.issuer)}, for {_names(certificate)}"
    if left < SOON:
        message = f"the certificate of {link.address} ends in {human_seconds(left)}; it is {seen}."
        return warning(message, _reissue(link), name=NAME)
    return ok(f"{seen}, until {certificate.not_valid_after_utc:%Y-%m-%d} ({version})", name=NAME)


def _refusal(
    error: ssl.SSLCertVerificationError,
    link: Link,
    certificate: x509.Certificate,
    authorities: Authorities | None,
) -> Finding:
    """What is wrong with a certificate that OpenSSL refuses."""
    if error.verify_code in OUT_OF_TIME:
        trusted = authorities.certificates if authorities else ()
        return _out_of_time(link, (certificate, *trusted))
    if error.verify_code in OTHER_NAME:
        message = (
            f"'{link.host}' is not among the names of the certificate of {link.address}: it is "
            f"for {_names(certificate)}."
        )
        return failed(message, _reissue(link), name=NAME)
    signer = certificate.issuer
    whose = "itself" if signer == certificate.subject else quoted(signer)
    message = f"the certificate of {link.address} is signed by {whose}"
    if authorities is None:
        again = f"flexlora doctor --superlink {link.address} --root-certificates CA.pem"
        return failed(f"{message}, whom this machine does not trust by itself.", again, name=NAME)
    path, trusted = authorities.path, authorities.certificates
    if any(signer == known.subject for known in trusted):
        message += f", and '{path}' has one of that name with which it does not verify"
    else:
        message += f", and '{path}' holds {', '.join(quoted(c.subject) for c in trusted[:3])}"
    remedy = f"openssl x509 -noout -subject -fingerprint -sha256 -in '{path}' (here, there)"
    return failed(f"{message} ({error.verify_message}).", remedy, name=NAME)


def _out_of_time(link: Link, certificates: Sequence[x509.Certificate]) -> Finding:
    """Expired or not yet valid; the server's clock tells whether ours is wrong."""
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
    message = f"the {whose} of {link.address} {when}"
    try:
        # Unverified: the server's clock only serves to explain the refusal.
        there = replace(link, context=unverified()).request("GET", "/health").date
    except (OSError, http.client.HTTPException):
        there = None
    if there is None:
        message += f", if this machine's clock ({_day(here)}) is right"
    elif first <= there <= last:
        message += f"; the server's clock says {_day(there)}, so this machine's clock is wrong"
        return failed(f"{message}.", "timedatectl set-ntp true", name=NAME)
    else:
        message += ", by the server's clock too"
    return failed(f"{message}.", _reissue(link), name=NAME)


def _validity(certificate: x509.Certificate) -> tuple[float, float]:
    return (
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


def _reissue(link: Link) -> str:
    return f"flexlora server init DIR --host {link.host} (on the server: makes another)"


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
