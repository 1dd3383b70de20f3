"""Certificates and servers on loopback for the tests of ``flexlora doctor --superlink``.

``Signer`` makes certificates with real keys; ``serving`` is an HTTP server, over TLS or not, that
answers as Flower's SuperLink does to the doctor's questions (``test_superlink_checks.py`` holds the
same questions against a real one); ``listening`` takes connections and says what it is told to.
"""

from __future__ import annotations

import http.server
import ipaddress
import json
import os
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flexlora.clients.setup.superlink_checks import check_superlink
from flexlora.deploy.doctor import diagnose

DAY = 86400.0
HERE = ("127.0.0.1", "::1", "localhost")


def common_name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def alternative(name):
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@dataclass(frozen=True, kw_only=True)
class Signer:
    """A certificate and its key, as files; days count from now."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    file: Path
    key_file: Path

    @classmethod
    def make(cls, folder, subject, *, by=None, names=(), ca=False, days=(-1.0, 60.0)):
        """Signed by another one, or by itself where ``by`` is None."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(common_name(subject))
            .issuer_name(by.certificate.subject if by else common_name(subject))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=days[0]))
            .not_valid_after(now + timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            spelled = x509.SubjectAlternativeName([alternative(name) for name in names])
            made = made.add_extension(spelled, critical=False)
        certificate = made.sign(by.key if by else key, hashes.SHA256())
        stem = f"{len(list(Path(folder).iterdir()))}-{'ca' if ca else 'server'}"
        file, key_file = Path(folder) / f"{stem}.pem", Path(folder) / f"{stem}.key"
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return cls(certificate=certificate, key=key, file=file, key_file=key_file)


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
        told = {"detail": "no"} if code is None else {"code": code, "detail": "no"}
        return status, json.dumps(told).encode()


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
def serving(said: Said | None = None, *, signer: Signer | None = None, host="127.0.0.1"):
    """The port of a server that answers as told; over TLS where it has a certificate."""
    kind: Any = _Server6 if ":" in host else _Server
    server = kind((host, 0), handler(said or Said()))
    if signer is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(signer.file, signer.key_file)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
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


def without_proxies(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


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
