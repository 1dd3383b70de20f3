"""Certificates and servers on loopback for the tests of ``flexlora doctor --superlink``.

``authority`` and ``server`` make certificates with trustme. ``serving`` is an HTTP server, over TLS
or not, that answers the doctor's requests as Flower's SuperLink does (``test_real_superlink.py``
asks a real one the same). ``listening`` accepts connections and sends a given greeting.
"""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flexlora.clients.setup.superlink_checks import check_superlink
from flexlora.deploy.doctor import diagnose

DAY = 86400.0
HERE = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate and its key, as files; ``ca`` signs others with it."""

    certificate: x509.Certificate
    file: Path
    key_file: Path
    ca: trustme.CA | None = None

    @classmethod
    def write(cls, folder, certificate, key, ca=None):
        stem = f"{len(list(Path(folder).iterdir()))}-{'ca' if ca else 'server'}"
        file, key_file = Path(folder) / f"{stem}.pem", Path(folder) / f"{stem}.key"
        file.write_bytes(certificate)
        key_file.write_bytes(key)
        parsed = x509.load_pem_x509_certificate(certificate)
        return cls(certificate=parsed, file=file, key_file=key_file, ca=ca)


def authority(folder, name="FlexLoRA CA"):
    ca = trustme.CA(organization_name="tests", organization_unit_name=name)
    return Issued.write(folder, ca.cert_pem.bytes(), ca.private_key_pem.bytes(), ca)


def server(folder, by, names=HERE, *, days=(-1.0, 60.0)):
    """A server's certificate for ``names``; days count from now."""
    first, last = (datetime.now(UTC) + timedelta(days=day) for day in days)
    leaf = by.ca.issue_cert(
        *names,
        common_name="superlink",
        organization_name="tests",
        organization_unit_name="servers",
        not_before=first,
        not_after=last,
    )
    (certificate,) = leaf.cert_chain_pems
    return Issued.write(folder, certificate.bytes(), leaf.private_key_pem.bytes())


def self_signed(folder, names):
    """A server's certificate without an authority, which trustme does not make."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "superlink")])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=60))
    if names:
        spelled = [
            x509.DNSName(n) if n[0].isalpha() else x509.IPAddress(ip_address(n)) for n in names
        ]
        made = made.add_extension(x509.SubjectAlternativeName(spelled), critical=False)
    pem = serialization.Encoding.PEM
    return Issued.write(
        folder,
        made.sign(key, hashes.SHA256()).public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


@dataclass(kw_only=True)
class Said:
    """What a server answers, by path: a status, and an error's code where Flower would give one."""

    fleet: tuple[int, int | None] = (415, 1002)
    control: tuple[int, int | None] = (415, 1002)
    activation: tuple[int, int | None] = (400, 2003)
    health: int = 200
    version: str = ""
    ahead: float | None = 0.0  # seconds by which its clock is ahead; None tells no time
    asked: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, method, path, content_type):
        self.asked.append((method, path))
        if path == "/health":
            return self.health, b""
        if path == "/openapi.json" and self.version:
            return 200, json.dumps(
                {"info": {"title": "SuperLink API", "version": self.version}}
            ).encode()
        if method == "POST" and path.startswith("/v1/control/"):
            status, code = self.control
        elif method == "POST" and path.startswith("/v1/fleet/"):
            wrong = content_type != "application/protobuf"
            status, code = self.fleet if wrong else self.activation
        else:
            return 404, b'{"detail":"Not Found"}'
        shown = {"detail": "no"} if code is None else {"code": code, "detail": "no"}
        return status, json.dumps(shown).encode()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that does not trust the certificate leaves: that is what is tested."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def handler(said):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self._reply("GET")

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._reply("POST")

        def _reply(self, method):
            status, body = said.answer(method, self.path, self.headers.get("Content-Type"))
            self.send_response_only(status)
            if said.ahead is not None:
                self.send_header("Date", self.date_time_string(time.time() + said.ahead))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler


@contextmanager
def serving(said: Said | None = None, *, certificate: Issued | None = None, host="127.0.0.1"):
    """The port of a server that answers as told; over TLS where it has a certificate."""
    kind: Any = _Server6 if ":" in host else _Server
    listener = kind((host, 0), handler(said or Said()))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.file, certificate.key_file)
        listener.socket = context.wrap_socket(listener.socket, server_side=True)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield listener.server_address[1]
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


@contextmanager
def listening(greeting=b""):
    """The port of a server that takes connections, says one thing or nothing, and waits."""
    taken, stop = [], threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.02)

        def take():
            while not stop.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                taken.append(connection)
                if greeting:
                    connection.sendall(greeting)

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            stop.set()
            thread.join()
            for connection in taken:
                connection.close()


def by_name(findings):
    """One finding per name, each a sentence that fits."""
    found = {finding.name: finding for finding in findings}
    assert len(found) == len(findings)
    for finding in findings:
        assert finding.name and "\n" not in finding.message and len(finding.message) < 330, finding
        assert bool(finding.remedy) == (finding.status != "ok"), finding
    return found


def asked(port, roots=None, *, host="127.0.0.1", key=None):
    check = partial(check_superlink, host, port, roots=roots and roots.file, key=key)
    return by_name(diagnose([("superlink", check)]))


def only(findings, status, name, *words):
    """The last finding, which has this status and says these words; nothing came after it."""
    last = list(findings.values())[-1]
    assert (last.status, last.name) == (status, name), last
    for word in words:
        assert word in last.message, last.message
    return last


def key_file(folder, key=None, *, mode=0o600):
    key = key or ec.generate_private_key(ec.SECP384R1())
    path = Path(folder) / "node-key"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    path.chmod(mode)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    Path(f"{path}.pub").write_bytes(public + b" node\n")
    return path
