"""Certificates, node keys and folders that deployments are made of, held against other programs."""

from __future__ import annotations

import os
import shutil
import ssl
import stat
import subprocess
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from flexlora.deploy import certificates, folder, hosts, node_keys
from flexlora.errors import UserError

HOSTS = [hosts.parse_host(text, "--host") for text in ("fl.example.org", "10.1.2.3", "fd00::5")]


@pytest.fixture(scope="module")
def issued(tmp_path_factory):
    """An authority and a server, as files."""
    place = tmp_path_factory.mktemp("tls")
    authority = certificates.make_authority("FlexLoRA test", days=30)
    server = certificates.make_server(authority, HOSTS, days=10)
    (place / "ca.crt").write_bytes(authority.certificate_pem)
    (place / "server.crt").write_bytes(server.certificate_pem)
    (place / "server.key").write_bytes(server.key_pem)
    return place


def run(*words):
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
def test_openssl_believes_the_chain_and_sees_every_name_by_its_kind(issued):
    authority, server = issued / "ca.crt", issued / "server.crt"
    strict = ("-x509_strict", "-purpose", "sslserver", "-CAfile", authority)
    assert run("openssl", "verify", *strict, server)[0] == 0
    for kind, name in (("hostname", "fl.example.org"), ("ip", "10.1.2.3"), ("ip", "fd00::5")):
        assert run("openssl", "verify", *strict, f"-verify_{kind}", name, server)[0] == 0
    assert run("openssl", "verify", *strict, "-verify_hostname", "other.org", server)[0] != 0
    text = run("openssl", "x509", "-in", server, "-noout", "-text")[1]
    names = "DNS:fl.example.org, IP Address:10.1.2.3, IP Address:FD00:0:0:0:0:0:0:5, DNS:localhost"
    assert names.lower() in text.lower() and "IP Address:127.0.0.1" in text


def test_a_stranger_authority_is_not_believed(issued, tmp_path):
    other = certificates.make_authority("another", days=30)
    (tmp_path / "other.crt").write_bytes(other.certificate_pem)
    greetings = [_greeted(issued, path, "fl.example.org") for path in (issued / "ca.crt",)]
    assert greetings == ["ok"]
    assert "unable to get local issuer" in _greeted(issued, tmp_path / "other.crt", "localhost")
    assert "mismatch" in _greeted(issued, issued / "ca.crt", "other.org")


def _greeted(issued, authority, name):
    """What Python's own TLS, the strict kind, says of a connection to ``name``."""
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving.load_cert_chain(issued / "server.crt", issued / "server.key")
    asking = ssl.create_default_context(cafile=str(authority))
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    ends = [ssl.MemoryBIO() for _ in range(4)]
    server = serving.wrap_bio(ends[0], ends[1], server_side=True)
    client = asking.wrap_bio(ends[2], ends[3], server_hostname=name)
    for _ in range(4):
        for side, inbox, outbox in ((client, ends[0], ends[3]), (server, ends[2], ends[1])):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                return str(error)
            inbox.write(outbox.read())
    return "ok"


def test_an_authority_signs_servers_and_no_authorities(issued):
    authority = x509.load_pem_x509_certificate((issued / "ca.crt").read_bytes())
    limits = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert limits.critical and limits.value.ca and limits.value.path_length == 0
    uses = authority.extensions.get_extension_for_class(x509.KeyUsage).value
    assert uses.key_cert_sign and not uses.digital_signature
    life = authority.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=29) < life < timedelta(days=31)


def test_what_is_no_authority_is_refused(issued, tmp_path):
    found = certificates.read_authorities(issued / "ca.crt")
    assert found.pem == (issued / "ca.crt").read_bytes()
    found.check_dates()
    (tmp_path / "junk").write_text("-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n")
    (tmp_path / "empty").write_bytes(b"")
    # Two in one file, the second one too old: a bundle is as good as its worst.
    old = certificates.make_authority("old", days=-1).certificate_pem
    (tmp_path / "old").write_bytes(found.pem + old)
    (tmp_path / "key").write_bytes(found.pem + (issued / "server.key").read_bytes())
    for path, words in (
        (tmp_path / "gone", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "junk", "holds no certificate"),
        (tmp_path / "empty", "holds no certificate"),
        (tmp_path / "old", "expired on"),
        (issued / "server.crt", "is no authority's"),
        (tmp_path / "key", "holds a private key, which is for the server alone"),
    ):
        with pytest.raises(UserError, match=words):
            certificates.read_authorities(path).check_dates()


def test_a_certificate_of_the_future_is_refused(issued, monkeypatch):
    class Behind(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(days=9)

    monkeypatch.setattr(certificates, "datetime", Behind)
    with pytest.raises(UserError, match=r"is not valid before .* set this machine's clock"):
        certificates.read_authorities(issued / "ca.crt").check_dates()


def test_node_keys_are_what_flower_and_ssh_keygen_read(tmp_path):
    keys = node_keys.make_node_keys("site-a")
    (tmp_path / "node").write_bytes(keys.private)
    (tmp_path / "node").chmod(0o600)
    (tmp_path / "node.pub").write_bytes(keys.public)
    private = node_keys.serialization.load_ssh_private_key(keys.private, None)
    assert try_load_public_key(tmp_path / "node.pub") == public_key_to_bytes(private.public_key())
    assert node_keys.make_node_keys("site-a").private != keys.private
    assert len(node_keys.make_secret()) == 64 and node_keys.make_secret() != node_keys.make_secret()
    if shutil.which("ssh-keygen"):
        assert "256 SHA256:" in run("ssh-keygen", "-l", "-f", tmp_path / "node.pub")[1]
        derived = run("ssh-keygen", "-y", "-f", tmp_path / "node")[1]
        assert derived.split()[:2] == keys.public.decode().split()[:2]


@pytest.mark.parametrize(
    ("text", "is_name"),
    [
        ("a.b", True),
        ("xn--bcher-kva.example", True),
        ("LOCALHOST", True),
        ("127.0.0.1", False),
        ("::1", False),
    ],
)
def test_hosts(text, is_name):
    host = hosts.parse_host(text, "--host")
    assert (host.text, host.address is None) == (text.lower(), is_name)
    assert host.is_loopback == (text not in ("a.b", "xn--bcher-kva.example"))


BAD_HOSTS = ["", "a b", "-a.org", "a..b", "300.1.1.1", "a:9092", "https://a", "*.a.org", "ä.org"]


@pytest.mark.parametrize("text", [*BAD_HOSTS, "a" * 64, ".".join(["abcd"] * 51), "[::1]", "1.2.3"])
def test_what_is_no_host_is_refused(text):
    with pytest.raises(UserError, match=r"--host is '.*expected a DNS name"):
        hosts.parse_host(text, "--host")


def test_superlinks():
    for text in ("fl.example.org:9092", "10.0.0.1:1", "[::1]:65535"):
        assert str(hosts.parse_superlink(text, "--superlink")) == text
    for text in (
        "fl.example.org",
        ":9092",
        "a:0",
        "a:65536",
        "a:x",
        "::1:9092",
        "a:9092/v1",
        "a:²",
        "[]:1",
    ):
        with pytest.raises(UserError, match=r"--superlink is '.*HOST:PORT"):
            hosts.parse_superlink(text, "--superlink")
    with pytest.raises(UserError, match=r"--superlink is '300.1.1.1', expected a DNS name"):
        hosts.parse_superlink("300.1.1.1:9092", "--superlink")


def test_names_ports_and_paths():
    assert hosts.parse_name("site-a_3@north", "--client-id") == "site-a_3@north"
    assert hosts.plain("/srv/fl-1.0/a@b+c=d", "the folder") == "/srv/fl-1.0/a@b+c=d"
    assert hosts.parse_port(1024, "--port") == 1024
    for text in ("", "-a", "a b", "a'b", "a/b", "a" * 65, "é"):
        with pytest.raises(UserError, match="--client-id is"):
            hosts.parse_name(text, "--client-id")
    for text in ("/a b", "/a$b", "/a%b", "/a:b", "/a'b", "/é", "/a\n", ""):
        with pytest.raises(UserError, match="the folder is"):
            hosts.plain(text, "the folder")
    for port in (0, 80, 1023, 65536):
        with pytest.raises(UserError, match="from 1024 to 65535"):
            hosts.parse_port(port, "--port")


def files(place):
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file()
    }


SECRET = folder.File(path="keys/a/secret", content=b"s", mode=folder.SECRET)
PUBLIC = folder.File(path="keys/public", content=b"p")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder.write_folder(tmp_path / "new", [PUBLIC, SECRET], empty={"state": 0o700})
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode)
        for path in tmp_path.rglob("*")
    }
    assert modes == {
        "new": 0o755,
        "new/state": 0o700,
        "new/keys": 0o755,
        "new/keys/public": 0o644,
        "new/keys/a": 0o700,
        "new/keys/a/secret": 0o600,
    }


def test_a_folder_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    """Whatever goes wrong at whichever file, nothing is left under the name or beside it."""
    wanted = [PUBLIC, SECRET]
    for broken in range(5):
        calls = iter(range(10))

        def full(number, broken=broken, calls=calls):
            if next(calls) == broken:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(folder.os, "fsync", full)
        try:
            folder.write_folder(tmp_path / "new", wanted, empty={})
        except UserError as error:
            assert "No space left" in str(error)
            if broken < len(wanted):
                assert list(tmp_path.iterdir()) == []
        finally:
            shutil.rmtree(tmp_path / "new", ignore_errors=True)


def test_nothing_is_overwritten_even_by_two_at_once(tmp_path):
    target = tmp_path / "new"
    target.mkdir()
    results = []

    def write(number):
        made = folder.File(path="who", content=str(number).encode())
        try:
            folder.write_folder(target, [made, SECRET], empty={})
            results.append(number)
        except UserError as error:
            assert "is not empty" in str(error) or "cannot be written" in str(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = results
    assert files(target) == {"who": str(winner).encode(), "keys/a/secret": b"s"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    before = files(target)
    with pytest.raises(UserError, match="is not empty, and init overwrites nothing"):
        folder.write_folder(target, [PUBLIC], empty={})
    assert files(target) == before


def test_places_that_are_none(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        folder.check_free(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written: "):
        folder.write_folder(tmp_path / "file" / "below", [PUBLIC], empty={})


def test_a_template_that_names_an_unknown_value_is_an_error(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "start").write_text("run $folder for $$HOME\n")
    (filled,) = folder.fill_tree(tmp_path, {"folder": "/srv"})
    assert (filled.path, filled.content, filled.mode) == (
        "bin/start",
        b"run /srv for $HOME\n",
        0o755,
    )
    with pytest.raises(KeyError, match="folder"):
        folder.fill_tree(tmp_path, {})
    assert folder.fill_tree(tmp_path, {}, wanted=lambda path: False) == []
