"""What stands between a node and its server: every fault is one sentence and a way to remedy it.

Servers are real ones on loopback, with certificates of all kinds.
"""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from flexlora.clients.setup.superlink_checks import check_superlink
from flexlora.deploy import connections, tls_checks
from flexlora.deploy.hosts import join_address, split_address
from flexlora.errors import UserError
from tls_servers import (
    DAY,
    HERE,
    Said,
    asked,
    authority,
    by_name,
    key_file,
    listening,
    only,
    self_signed,
    server,
    serving,
)

pytestmark = pytest.mark.usefixtures("no_proxy")


# The address


@pytest.mark.parametrize(
    ("text", "address"),
    [("10.0.0.1:8000", ("10.0.0.1", 8000)), ("[::1]:80", ("::1", 80)), ("host:1", ("host", 1))],
)
def test_addresses(text, address):
    assert split_address(text, "--superlink") == address
    assert join_address(*address) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "expected HOST:PORT") for text in ("host", ":80", "host:", "host:x", "host:-1")),
        ("host:70000", "expected HOST:PORT"),
        ("https://host:9092", "try 'host:9092'"),
        ("::1:80", r"expected HOST:PORT with brackets around an IPv6 address: '\[::1\]:80'"),
    ],
)
def test_what_is_no_address_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        split_address(text, "--superlink")


# The connection


def test_a_port_on_which_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    last = only(asked(port), "failed", "superlink", f"127.0.0.1:{port} refuses connections")
    assert "--port" in last.remedy


def test_a_name_that_is_no_host():
    only(asked(1, host="a..b"), "failed", "superlink", "'a..b' cannot be resolved")


@pytest.mark.parametrize(
    ("error", "words", "remedy"),
    [
        (
            socket.gaierror(-2, "Name or service not known"),
            "cannot be resolved here: Name or",
            "get",
        ),
        (TimeoutError("timed out"), "does not answer within 5 s: a firewall", "nc -vz"),
        (
            OSError(101, "Network is unreachable"),
            "cannot be reached: Network is unreach",
            "ip route",
        ),
    ],
)
def test_a_server_that_cannot_be_reached(error, words, remedy, monkeypatch):
    def refuses(*_, **__):
        raise error

    monkeypatch.setattr(connections.socket, "create_connection", refuses)
    last = only(asked(9092, host="far.example"), "failed", "superlink", words)
    assert last.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("greeting", "words"),
    [(b"", "takes connections and says nothing"), (b"SSH-2.0-x\r\n", "neither TLS nor HTTP")],
)
def test_a_server_that_speaks_something_else(greeting, words, monkeypatch):
    honest, waits = socket.create_connection, set()

    def recorded(address, timeout=None, *rest, **options):
        waits.add(timeout)
        return honest(address, timeout, *rest, **options)

    monkeypatch.setattr(connections, "SECONDS", 0.3)
    monkeypatch.setattr(connections.socket, "create_connection", recorded)
    with listening(greeting) as port:
        only(asked(port), "failed", "superlink", words)
    assert waits == {0.3}


def test_nobody_else_is_contacted(monkeypatch, ca, leaf, tmp_path):
    honest, contacted = socket.create_connection, set()

    def recorded(address, *rest, **options):
        contacted.add(address)
        return honest(address, *rest, **options)

    monkeypatch.setattr(socket, "create_connection", recorded)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with serving(certificate=leaf) as port:
        assert "superlink" in asked(port, ca, key=key_file(tmp_path))
        assert contacted == {("127.0.0.1", port)}


# The certificate


def test_a_superlink_over_tls_whose_certificate_is_in_order(ca, leaf):
    with serving(Said(version="1.41.0"), certificate=leaf) as port:
        found = asked(port, ca)
    assert {finding.status for finding in found.values()} == {"ok"}
    assert list(found) == ["certificate", "superlink", "clock", "control path"]
    assert (
        "signed by 'OU=FlexLoRA CA,O=tests', for localhost, 127.0.0.1, ::1"
        in found["certificate"].message
    )
    assert found["superlink"].message.endswith("is a SuperLink of Flower 1.41.0 over TLS")


@pytest.mark.parametrize("host", ["localhost", "::1"])
def test_other_names_of_the_same_server(host, ca, leaf):
    try:
        served = serving(certificate=leaf, host="::1" if host == "::1" else "127.0.0.1")
        with served as port:
            assert {f.status for f in asked(port, ca, host=host).values()} == {"ok"}
    except OSError as error:
        if host != "::1":
            raise
        pytest.skip(f"no IPv6 here: {error}")


def test_a_certificate_of_another_authority(folder, ca):
    other = authority(folder, "Somebody CA")
    with serving(certificate=server(folder, other)) as port:
        last = only(
            asked(port, ca),
            "failed",
            "certificate",
            "'OU=Somebody CA,O=tests'",
            "'OU=FlexLoRA CA,O=tests'",
        )
        assert "fingerprint" in last.remedy
        unasked = only(asked(port), "failed", "certificate", "whom this machine does not trust")
        assert "--root-certificates" in unasked.remedy
        assert asked(port, other)["certificate"].status == "ok"


def test_an_authority_of_the_same_name_and_another_key(folder, ca):
    twin = authority(folder)
    with serving(certificate=server(folder, twin)) as port:
        only(asked(port, ca), "failed", "certificate", "one of that name with which it does not")


def test_a_certificate_that_stands_for_itself(folder, ca):
    alone = self_signed(folder, HERE)
    with serving(certificate=alone) as port:
        only(asked(port, ca), "failed", "certificate", "is signed by itself, and")
        assert asked(port, alone)["certificate"].status == "ok"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("superlink.example", "10.1.2.3"), "it is for superlink.example, 10.1.2.3."),
        ((), "it has no subjectAltName; its subject is 'CN=superlink'"),
    ],
)
def test_a_certificate_for_another_name(names, words, folder, ca):
    shown = server(folder, ca, names) if names else self_signed(folder, ())
    with serving(certificate=shown) as port:
        last = only(
            asked(port, ca if names else shown),
            "failed",
            "certificate",
            "'127.0.0.1' is not among",
            words,
        )
    assert last.remedy.startswith("flexlora server init DIR --host 127.0.0.1")


@pytest.mark.parametrize(
    ("days", "ahead", "words", "remedy"),
    [
        ((-30.0, -2.0), 0.0, ["ended on", "2.0 days ago, by the server's clock too"], "flexlora"),
        ((-30.0, -2.0), -5 * DAY, ["ended on", "so this machine's clock is wrong"], "timedatectl"),
        ((-30.0, -2.0), None, ["2.0 days ago, if this machine's clock ("], "flexlora"),
        ((3.0, 30.0), 0.0, ["is valid from", "3.0 days ahead, by the server's"], "flexlora"),
        (
            (3.0, 30.0),
            5 * DAY,
            ["is valid from", "so this machine's clock is wrong"],
            "timedatectl",
        ),
    ],
)
def test_a_certificate_out_of_its_time(days, ahead, words, remedy, folder, ca):
    with serving(Said(ahead=ahead), certificate=server(folder, ca, days=days)) as port:
        last = only(asked(port, ca), "failed", "certificate", "the certificate of", *words)
    assert last.remedy.startswith(remedy)


def test_an_authority_that_has_ended(folder, monkeypatch):
    monkeypatch.setattr(trustme, "DEFAULT_EXPIRY", datetime.now(UTC) - timedelta(days=3))
    old = authority(folder, "Old CA")
    with serving(certificate=server(folder, old)) as port:
        only(asked(port, old), "failed", "certificate", "the authority of", "3.0 days ago")


def test_a_certificate_that_ends_soon_still_works(folder, ca):
    with serving(certificate=server(folder, ca, days=(-9.0, 5.0))) as port:
        found = asked(port, ca)
    assert (
        found["certificate"].status == "warning"
        and "ends in 5.0 days" in found["certificate"].message
    )
    assert found["superlink"].status == "ok"


def test_names_from_the_other_side_do_not_steer_a_terminal(folder, ca):
    loud = authority(folder, "x\x1b[31mred")
    with serving(certificate=server(folder, loud)) as port:
        last = only(asked(port, ca), "failed", "certificate", "red")
    assert last.message.isprintable()


def files(folder, ca, leaf):
    der = ca.certificate.public_bytes(serialization.Encoding.DER)
    (folder / "ca.der").write_bytes(der)
    (folder / "garbage").write_text("hello")
    (folder / "both").write_bytes(ca.file.read_bytes() + ca.key_file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("name", "words", "remedy"),
    [
        ("absent", "cannot be read: No such file", "ls -l"),
        (".", "cannot be read: Is a directory", "ls -l"),
        ("ca.der", "holds no certificate in PEM", "openssl x509 -inform der"),
        ("garbage", "holds no certificate in PEM", "openssl x509"),
        ("both", "holds a private key, which is for the server alone", "openssl x509 -in"),
    ],
)
def test_a_file_that_holds_no_authority(name, words, remedy, tmp_path, ca, leaf):
    path = files(tmp_path, ca, leaf) / name
    with serving(certificate=leaf) as port:
        found = by_name(check_superlink("127.0.0.1", port, roots=path))
    assert only(found, "failed", "certificate", words).remedy.startswith(remedy)


def test_a_servers_certificate_in_place_of_its_authoritys(ca, leaf):
    with serving(certificate=leaf) as port:
        words = (
            "is no authority's: it is the certificate of 'CN=superlink,OU=servers,O=tests'",
            "'OU=FlexLoRA CA,O=tests'",
        )
        only(asked(port, leaf), "failed", "certificate", *words)


def test_plain_http(ca, monkeypatch):
    with serving() as port:
        last = only(asked(port, ca), "failed", "certificate", "speaks plain HTTP, and root")
        assert "--ssl-certfile" in last.remedy
        own = asked(port)
        assert own["superlink"].status == "ok" and "certificate" not in own
        monkeypatch.setattr(tls_checks, "is_loopback", lambda address: False)
        found = asked(port)
        assert found["certificate"].status == "warning"
        assert "whoever is between" in found["certificate"].message
        assert found["superlink"].status == "ok"


@pytest.mark.parametrize(
    ("address", "own"),
    [
        *(("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("::ffff:127.0.0.1", True)),
        *(("10.0.0.1", False), ("::ffff:10.0.0.1", False), ("fe80::1%eth0", False)),
    ],
)
def test_which_addresses_never_leave_the_machine(address, own):
    assert connections.is_loopback(address) is own


def test_a_proxy_in_the_environment_that_only_flower_would_use(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@proxy.example:3128")
    with serving() as port:
        finding = asked(port)["proxy"]
        assert finding.status == "warning" and "through 'proxy.example'" in finding.message
        assert "secret" not in finding.message and finding.remedy == "export NO_PROXY=127.0.0.1"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert "proxy" not in asked(port)
