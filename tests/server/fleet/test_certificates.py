"""Certificates change while nodes go on: what each of them verifies at each step."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from flexlora.commands.cli import main
from flexlora.deploy.certificates import alternative_names
from flexlora.server.init import server_init


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "server"
    server_init(folder=str(path), host=["fl.example.org", "fd00::5"], days=30)
    return path


def accepts(authorities: bytes, folder: Path) -> bool:
    """A TLS handshake in memory between a node that trusts ``authorities`` and the server."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "tls" / "server.key")
    node = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    node.load_verify_locations(cadata=authorities.decode())
    to_server, to_node = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        node.wrap_bio(to_node, to_server, server_hostname="fl.example.org"),
        server.wrap_bio(to_server, to_node, server_side=True),
    ]
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return ends[0].version() is not None


def rotate(folder, *words):
    return main(["fleet", "rotate", *words, "--server", str(folder)])


def test_a_new_certificate_has_the_same_names_another_key_and_the_same_authority(folder, capsys):
    before = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    trusted = (folder / "ca.crt").read_bytes()
    assert rotate(folder, "--certificates", "--days", "90") == 0
    assert "nodes need nothing" in capsys.readouterr().out
    after = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    assert alternative_names(after) == alternative_names(before)
    assert after.public_key() != before.public_key()
    assert after.not_valid_after_utc > before.not_valid_after_utc
    assert accepts(trusted, folder)
    assert stat.S_IMODE((folder / "tls" / "server.key").stat().st_mode) == 0o600


def test_a_new_authority_overlaps_with_the_old_one(folder):
    old = (folder / "ca.crt").read_bytes()
    assert rotate(folder, "--authority", "new") == 0
    both = (folder / "ca.crt").read_bytes()
    assert both.startswith(old) and both.count(b"BEGIN CERTIFICATE") == 2
    assert accepts(old, folder) and accepts(both, folder), "the server shows the old one"
    assert rotate(folder, "--certificates") == 0
    assert not accepts(old, folder) and accepts(both, folder), "it shows the new one"
    assert rotate(folder, "--authority", "only") == 0
    alone = (folder / "ca.crt").read_bytes()
    assert alone.count(b"BEGIN CERTIFICATE") == 1 and accepts(alone, folder)
    assert old not in alone


def test_what_is_refused(folder, capsys):
    def refused(*words):
        assert rotate(folder, *words) == 2
        return capsys.readouterr().err

    assert "--days is 9999, expected 1 to 36" in refused("--certificates", "--days", "9999")
    assert "Did you mean 'only'?" in refused("--authority", "onyl")
    assert "expected NAME NEWKEY.pub, or --certificates" in refused("site-a")
    assert "expected NAME NEWKEY.pub" in refused("a", "b.pub", "--certificates")
    (folder / "private" / "ca.key").rename(folder / "away")
    assert "put the authority's key back there" in refused("--certificates")
    other = folder.parent / "other"
    server_init(folder=str(other), host=["localhost"], days=30)
    (other / "private" / "ca.key").rename(folder / "private" / "ca.key")
    assert "is the key of no authority in" in refused("--certificates")
