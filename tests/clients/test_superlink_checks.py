"""``flexlora doctor --superlink``: is it one, do clocks agree, is control shut, is the key known?

The servers answer as ``Said`` says; ``test_real_superlink.py`` asks a real one the same.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

import flexlora
from flexlora.clients.setup import superlink_checks
from flexlora.clients.setup.superlink_checks import check_trainer, node_checks
from flexlora.clients.trainer import client as trainer_client
from flexlora.clients.trainer.trainer_pb2 import HealthReply
from flexlora.commands.cli import main
from flexlora.deploy import doctor, tls_checks
from flexlora.simulations import flower_checks
from tls_servers import DAY, Said, asked, key_file, only, serving
from trainers import resident, write_rows

pytestmark = pytest.mark.usefixtures("no_proxy")


# Whether it is a SuperLink, and what it answers


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (Said(fleet=(404, None), health=404), "does not answer as a SuperLink does"),
        (Said(fleet=(415, None)), "does not answer as a SuperLink does"),
        (Said(fleet=(502, None), health=502), "a proxy that does not reach its SuperLink (502)"),
        (Said(fleet=(502, None), health=200), "a proxy that does not reach its SuperLink (502)"),
    ],
)
def test_a_server_that_is_no_superlink(said, words, ca, leaf):
    with serving(said, certificate=leaf) as port:
        only(asked(port, ca), "failed", "superlink", words)


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [
        ("", "ok", "its version does not show"),
        ("1.41.7", "ok", "of Flower 1.41.7"),
        ("1.42.0", "warning", "is a SuperLink of Flower 1.42.0, this machine has 1.41"),
    ],
)
def test_the_version_of_a_superlink(version, status, words):
    with serving(Said(version=version)) as port:
        finding = asked(port)["superlink"]
    assert finding.status == status and words in finding.message


@pytest.mark.parametrize(
    ("ahead", "status", "words"),
    [
        (
            0.0,
            "ok",
            "off the server's; node authentication takes a clock 5 s ahead and 305 s behind",
        ),
        (-5.5, "warning", r" [345]\.\d s ahead of the server's, near the limit: node auth"),
        (
            -9.0,
            "failed",
            r" [789]\.\d s ahead of the server's; node authentication takes",
        ),
        (250.0, "ok", "305 s behind"),
        (304.5, "warning", r" 30[4-9]\.\d s behind the server's, near the limit"),
        (400.0, "failed", r" 40\d\.\d s behind the server's; node authentication"),
        (-3 * DAY, "failed", r"3\.0 days ahead of the server's"),
        (None, "warning", "does not tell its time"),
    ],
)
def test_two_clocks(ahead, status, words):
    with serving(Said(ahead=ahead)) as port:
        finding = asked(port)["clock"]
    assert finding.status == status and re.search(words, finding.message), finding.message


@pytest.mark.parametrize(
    ("control", "own", "status", "words"),
    [
        ((415, 1002), True, "ok", "open, and asked on this machine's own address"),
        ((415, 1002), False, "warning", "the control path is reachable from this machine"),
        ((403, None), False, "ok", "shut from here (status 403)"),
        ((401, None), False, "ok", "shut from here (status 401)"),
        ((404, None), True, "ok", "shut from here (status 404)"),
    ],
)
def test_the_control_path(control, own, status, words, monkeypatch):
    monkeypatch.setattr(tls_checks, "is_loopback", lambda address: own)
    with serving(Said(control=control)) as port:
        finding = asked(port)["control path"]
    assert finding.status == status and words in finding.message


def test_a_server_that_breaks_off(monkeypatch):
    class Fails(Said):
        def answer(self, method, path, content_type):
            if path != "/health":
                raise ConnectionError("gone")
            return super().answer(method, path, content_type)

    with serving(Fails()) as port:
        only(asked(port), "failed", "superlink", "breaks off its answer to POST /v1/fleet/")


# The node's key


@pytest.mark.parametrize(
    ("activation", "status", "words"),
    [
        ((400, 2003), "ok", "is registered"),
        ((412, 2004), "failed", "does not know the key"),
        ((401, None), "failed", "the clocks differ by too much"),
        ((200, None), "warning", "does not say whether it knows the key"),
    ],
)
def test_what_a_superlink_says_of_a_key(activation, status, words, tmp_path):
    said = Said(activation=activation)
    with serving(said) as port:
        last = only(asked(port, key=key_file(tmp_path)), status, "node key", words)
    assert said.asked[-1] == ("POST", "/v1/fleet/activate-node")
    if activation[1] == 2004:
        assert last.remedy == f"flexlora fleet add NAME '{tmp_path}/node-key.pub' (on the server)"


def test_a_key_that_others_may_read(tmp_path):
    with serving() as port:
        words = "is registered, and others on this machine may read"
        last = only(asked(port, key=key_file(tmp_path, mode=0o644)), "warning", "node key", words)
    assert last.remedy.startswith("chmod 600")


def with_passphrase(pem):
    """The key file with the header of an encrypted one (OpenSSH's PROTOCOL.key)."""
    begin, *lines, end = pem.decode().strip().splitlines()
    words = [b"aes256-ctr", b"bcrypt", struct.pack(">I16sI", 16, b"salt", 16)]
    header = b"".join(struct.pack(">I", len(word)) + word for word in words)
    plain = b"\0\0\0\4none\0\0\0\4none\0\0\0\0"
    body = base64.b64decode("".join(lines))
    assert plain in body
    return "\n".join(
        [begin, base64.b64encode(body.replace(plain, header)).decode(), end, ""]
    ).encode()


def test_a_file_that_holds_no_key(tmp_path):
    path, locked, odd = key_file(tmp_path), tmp_path / "locked", tmp_path / "odd"
    locked.write_bytes(with_passphrase(path.read_bytes()))
    odd.mkdir()
    strange = key_file(odd, ed25519.Ed25519PrivateKey.generate())
    cases = {
        tmp_path / "absent": "cannot be read: No such file",
        Path(f"{path}.pub"): "is no private key in OpenSSH's format",
        locked: "or it has a passphrase",
        strange: "is not on a NIST curve",
    }
    with serving() as port:
        for file, words in cases.items():
            only(asked(port, key=file), "failed", "node key", words)


# The trainer


def test_a_trainer_that_is_not_there(tmp_path):
    finding = check_trainer(tmp_path / "none.sock")
    assert (
        finding.status == "failed"
        and "cannot be reached: there is no such socket" in finding.message
    )
    assert finding.remedy.startswith("flexlora client serve --socket")


def test_a_trainer_that_listens(tmp_path):
    with resident(write_rows(tmp_path / "data"), tmp_path / "kept") as made:
        finding = check_trainer(made.path)
    assert finding.status == "ok", finding
    assert f"FlexLoRA {flexlora.__version__} holds embedded on cpu" in finding.message
    assert finding.message.endswith(": idle")


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "ok", "holds embedded in nf4 on cpu: idle"),
        ({"doing": "train, run 7", "seconds": 75.0}, "ok", "train, run 7 for 75.0 s"),
        ({"version": "0.0.9"}, "failed", "is FlexLoRA 0.0.9, this one is"),
        ({"stopping": True}, "warning", "is stopping"),
    ],
)
def test_how_a_trainer_is(changes, status, words, monkeypatch):
    printed = {"version": flexlora.__version__, "model": "embedded", "quantization": "nf4"}
    reply = HealthReply(**{**printed, "device": "cpu", **changes})
    monkeypatch.setattr(trainer_client, "health", lambda path: reply)
    finding = check_trainer(Path("/run/flexlora/trainer.sock"))
    assert finding.status == status and words in finding.message


# The command


def run_doctor(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.setattr(flower_checks, "check_flower", lambda: doctor.ok("left out here"))
    status = main(["doctor", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_the_command_fails_where_a_check_did(monkeypatch, capsys, ca, leaf):
    with serving(certificate=leaf) as port:
        given = ("--superlink", f"127.0.0.1:{port}", "--format", "json")
        status, out, _ = run_doctor(monkeypatch, capsys, *given, "--root-certificates", ca.file)
        assert status == 0 and json.loads(out)["ok"] is True
        status, out, _ = run_doctor(monkeypatch, capsys, *given, "--root-certificates", leaf.file)
    printed = json.loads(out)
    assert status == 1 and printed["ok"] is False
    assert printed["findings"][-1]["name"] == "certificate" and printed["findings"][-1]["remedy"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--root-certificates", "ca.pem"], "--root-certificates is 'ca.pem' and no SuperLink is"),
        (["--node-key", "k"], "--node-key is 'k' and no SuperLink is named; give --superlink"),
        (["--superlink", "https://x:1"], "try 'x:1'"),
    ],
)
def test_what_was_mistyped_is_told_before_anything_is_tried(given, message, monkeypatch, capsys):
    monkeypatch.setattr(superlink_checks, "inspect_endpoint", pytest.fail)
    status, _, err = run_doctor(monkeypatch, capsys, *given)
    assert status == 2 and message in err and err.count("\n") == 1


def test_every_address_is_asked_and_the_trainer(tmp_path):
    checks = node_checks(["a:1", "[::1]:2"], "", "", str(tmp_path))
    assert [name for name, _ in checks] == ["superlink", "superlink", "trainer"]
