"""A node that knows a token and nothing else: whom it believes, and what others get to see."""

from __future__ import annotations

import json
import ssl
import threading
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from flexlora.clients.setup.first_contact import NotNow, ask, fetch_authority
from flexlora.clients.setup.trust import trust
from flexlora.deploy.hosts import parse_superlink
from flexlora.deploy.invitation import Token
from flexlora.errors import UserError


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@contextmanager
def serving(leaf, shown, status=200, answer=None):
    """A server with the certificate ``leaf`` that shows ``shown`` as its authorities."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(200, shown)

        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._send(status, json.dumps(answer or {}).encode())

        def _send(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(context)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port, seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def token_for(ca, port):
    certificate = x509.load_pem_x509_certificate(ca.cert_pem.bytes())
    digest = sha256(certificate.public_bytes(Encoding.DER)).digest()
    return Token.make(parse_superlink(f"localhost:{port}", "--superlink"), digest)


def test_the_right_server_gets_the_secret_and_only_its_authority_is_taken(authority):
    leaf, other = authority.issue_cert("localhost"), trustme.CA()
    shown = other.cert_pem.bytes() + authority.cert_pem.bytes()
    answer = {"state": "welcome", "sentence": "good \x1b[2J", "name": "site-a"}
    with serving(leaf, shown, answer=answer) as (port, seen):
        token = token_for(authority, port)
        trusted = fetch_authority(token)
        assert trusted == authority.cert_pem.bytes(), "not the other one that was shown"
        printed = ask(token, trusted)
    assert (printed.state, printed.sentence, printed.name) == ("welcome", "good ?[2J", "site-a")
    assert seen[0]["secret"] == token.secret.hex() and "PRIVATE" not in json.dumps(seen)


def test_somebody_between_who_shows_the_right_authority_gets_nothing(authority):
    with serving(trustme.CA().issue_cert("localhost"), authority.cert_pem.bytes()) as (port, seen):
        token = token_for(authority, port)
        with pytest.raises(UserError, match=r"does not vouch for: .*Nothing was sent"):
            ask(token, fetch_authority(token))
    assert seen == []


def test_a_certificate_of_the_authority_for_another_name_gets_nothing(authority):
    leaf = authority.issue_cert("other.example.org")
    with serving(leaf, authority.cert_pem.bytes()) as (port, seen):
        token = token_for(authority, port)
        with pytest.raises(UserError, match=r"does not vouch for: .*Nothing was sent"):
            ask(token, fetch_authority(token))
    assert seen == []


@pytest.mark.parametrize("shown", ["another", "none"])
def test_another_authority_than_the_tokens_is_refused_at_once(authority, shown):
    other = trustme.CA()
    body = other.cert_pem.bytes() if shown == "another" else b"nothing"
    refused = pytest.raises(UserError, match="another authority than the token names")
    with serving(other.issue_cert("localhost"), body) as (port, seen), refused:
        fetch_authority(token_for(authority, port))
    assert seen == []


@pytest.mark.parametrize(
    ("status", "answer", "kind", "words"),
    [
        (403, {"state": "refused", "sentence": "expired."}, UserError, "refuses: expired."),
        (503, {"sentence": "no SuperLink"}, NotNow, "cannot do it now: no SuperLink"),
        (429, {}, NotNow, "cannot do it now: HTTP 429"),
        (502, {}, NotNow, "the proxy answers, and the enrolment behind"),
        (404, {}, UserError, "answers 404 where nodes enrol"),
    ],
)
def test_each_answer_is_a_sentence(authority, status, answer, kind, words):
    leaf, shown = authority.issue_cert("localhost"), authority.cert_pem.bytes()
    refused = pytest.raises(kind, match=words)
    with serving(leaf, shown, status, answer) as (port, _), refused as printed:
        ask(token_for(authority, port), shown)
    assert isinstance(printed.value, NotNow) == (kind is NotNow)


def test_nobody_there_is_a_cause_to_try_again(authority):
    with pytest.raises(NotNow, match="does not answer: Connection refused"):
        fetch_authority(token_for(authority, 1))


def test_a_node_takes_new_authorities_from_the_server_that_it_trusts_and_nobody_else(
    authority, tmp_path, capsys
):
    file, both = tmp_path / "ca.crt", authority.cert_pem.bytes() + trustme.CA().cert_pem.bytes()
    file.write_bytes(authority.cert_pem.bytes())
    with serving(authority.issue_cert("localhost"), both) as (port, _):
        trust(superlink=f"localhost:{port}", root_certificates=str(file))
        assert file.read_bytes() == both and "2 authorities" in capsys.readouterr().out
        trust(superlink=f"localhost:{port}", root_certificates=str(file))
        assert "is the server's already" in capsys.readouterr().out
    stranger = trustme.CA()
    refused = pytest.raises(UserError, match="does not vouch for")
    with serving(stranger.issue_cert("localhost"), stranger.cert_pem.bytes()) as (port, _), refused:
        trust(superlink=f"localhost:{port}", root_certificates=str(file))
    assert file.read_bytes() == both
