"""What a server answers a node that joins with a token: every refusal, and that it counts right."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from starlette.testclient import TestClient

from flexlora.deploy.hosts import parse_superlink
from flexlora.deploy.invitation import ENROLL_PATH, Token, signed_part
from flexlora.deploy.node_keys import make_node_keys
from flexlora.server.fleet.commands import fleet_add, fleet_list, fleet_revoke
from flexlora.server.fleet.enrolment import Request, answer
from flexlora.server.fleet.enrolment_service import enrolment_app
from flexlora.server.fleet.invitations import Invitation, Invitations, PendingNodes
from flexlora.server.fleet.table import FleetTable, moment


class Node:
    """A node with a key and a name."""

    def __init__(self, name):
        self.name, keys = name, make_node_keys(name)
        self.line, self.private = keys.public.decode(), load_ssh_private_key(keys.private, None)

    def request(self, token, **changes):
        signed = signed_part(token.invitation, changes.get("name", self.name))
        values = {
            "invitation": token.invitation,
            "secret": token.secret,
            "name": self.name,
            "public_key": self.line,
            "signature": self.private.sign(signed, ec.ECDSA(hashes.SHA256())),
        }
        return Request(**values | changes)


@pytest.fixture
def invited(folder):
    """Makes an invitation; its token."""

    def make(hours=1.0, **values):
        token = Token.make(parse_superlink("localhost:9092", "x"), bytes(32))
        now = datetime.now(UTC)
        expires = moment(now + timedelta(hours=hours))
        digest, made = token.secret_digest, moment(now)
        values = {"id": token.invitation, "secret_digest": digest, "made": made, **values}
        Invitations(folder).put(Invitation(expires=expires, **values), oldest="")
        return token

    return make


@pytest.fixture
def ask(folder):
    def asked(request):
        given = answer(folder, request, "192.0.2.7")
        return given.state, given.sentence

    return asked


def registered(folder):
    return set(FleetTable.read(folder / "nodes" / "fleet.json").names_by_node(moment()).values())


def test_a_pending_node_waits_for_an_operator_and_is_in_when_he_says_so(
    folder,
    invited,
    ask,
    capsys,
):
    token, node = invited(), Node("site-a")
    state, sentence = ask(node.request(token))
    assert state == "pending" and "`flexlora fleet add site-a`" in sentence
    assert registered(folder) == set()
    assert ask(node.request(token))[0] == "pending", "asking again uses the token no second time"
    fleet_list(server=str(folder))
    assert "asked on 20" in capsys.readouterr().out
    assert fleet_add("site-a", server=str(folder)) == 0
    assert ask(node.request(token)) == ("admitted", "site-a is registered.")
    assert registered(folder) == {"site-a"} and list(PendingNodes(folder).all()) == []


def test_an_invitation_may_let_nodes_in_at_once_as_many_as_it_says(folder, invited, ask):
    token = invited(count=2, approve=True)
    for name in ("site-a", "site-b"):
        assert ask(Node(name).request(token))[0] == "admitted"
    state, sentence = ask(Node("site-c").request(token))
    assert state == "refused" and "was used already: it lets a key in 2 times" in sentence
    assert registered(folder) == {"site-a", "site-b"}


def test_an_operator_turns_a_waiting_node_away(folder, invited, ask):
    token, node = invited(), Node("site-a")
    ask(node.request(token))
    assert fleet_revoke(["site-a"], server=str(folder)) == 0
    assert "the server's owner has refused it on 20" in ask(node.request(token))[1]
    assert registered(folder) == set()


def test_every_refusal_is_a_sentence_and_registers_nobody(folder, invited, ask):
    good, node, other = invited(count=9, approve=True), Node("site-a"), Node("site-b")
    ask(other.request(good))
    cases = {
        "has expired on 20": node.request(invited(hours=-1.0)),
        "the token's secret is wrong": node.request(good, secret=bytes(24)),
        "knows no such token": node.request(replace(good, invitation="00" * 6)),
        "is for a node named 'site-z', and this one is 'site-a'": node.request(
            invited(name="site-z")
        ),
        "the name 'site-b' is taken by another key": Node("site-b").request(good),
        "this key is the one of 'site-b', and the name is 'site-a'": other.request(
            good, name="site-a"
        ),
        "not signed by the key that it brings": node.request(good, public_key=other.line),
        "is no public key in OpenSSH's form": node.request(good, public_key="ssh-rsa AAAA"),
        "the node's name is '../x'": node.request(good, name="../x"),
    }
    for words, request in cases.items():
        state, sentence = ask(request)
        assert state == "refused" and words in sentence, (words, sentence)
    assert registered(folder) == {"site-b"}
    assert (
        "is taken"
        in ask(Request(**vars(node.request(good)) | {"name": "site-b", "public_key": ""}))[1]
    )


def test_a_revoked_key_does_not_come_back_with_a_token(folder, invited, ask):
    token, node = invited(count=9, approve=True), Node("site-a")
    ask(node.request(token))
    fleet_revoke(["site-a"], server=str(folder))
    assert "this key was revoked on 20" in ask(node.request(token))[1]
    assert "is taken by another key" in ask(Node("site-a").request(token))[1], "the name is kept"
    assert registered(folder) == set()


def test_a_superlink_that_is_down_uses_up_no_token(folder, superlink, invited):
    token, node = invited(approve=True), Node("site-a")
    (folder / "ca.crt").write_text("pem")
    client = TestClient(enrolment_app(folder))
    body = {k: v.hex() if isinstance(v, bytes) else v for k, v in vars(node.request(token)).items()}
    superlink.fails = {"register"}
    first = client.post(ENROLL_PATH, json=body)
    assert (first.status_code, first.json()["sentence"]) == (503, "the SuperLink does not answer")
    assert client.post(ENROLL_PATH, json=body).json()["state"] == "admitted"


def test_the_endpoint_takes_nothing_else(folder, invited, caplog):
    (folder / "ca.crt").write_text("pem")
    client = TestClient(enrolment_app(folder))
    bad = {
        "no json": b"{",
        "no object": b"[]",
        "no text": b'{"name": 3}',
        "no hex": b'{"secret": "x"}',
    }
    for what, body in bad.items():
        assert client.post(ENROLL_PATH, content=body).status_code == 503, what
    assert client.post(ENROLL_PATH, content=b"x" * 9000).status_code == 413
    assert client.get("/docs").status_code == 404 and client.get("/openapi.json").status_code == 404
    token = invited()
    refused = client.post(
        ENROLL_PATH,
        json={"invitation": token.invitation, "secret": "00"},
        headers={"X-Real-IP": "192.0.2.9\x1b[2J"},
    )
    assert refused.status_code == 403 and "192.0.2.9?[2J" in caplog.text
    assert token.secret.hex() not in json.dumps(refused.json()) + caplog.text


def test_the_file_of_invitations_has_no_secret_and_is_its_owners_alone(folder, invited):
    token = invited()
    file = folder / "nodes" / "invitations.json"
    assert token.secret.hex() not in file.read_text() and str(token) not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
