"""The table and the SuperLink changed together, also where one of two steps did not happen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fleet_fakes import new_key
from flexlora.errors import UserError
from flexlora.server.fleet.control_api import KnownNode
from flexlora.server.fleet.operations import open_fleet
from flexlora.server.fleet.table import REVOKED, FleetTable, changing, moment


def table_of(folder):
    return FleetTable.read(folder / "nodes" / "fleet.json")


def change(folder, method, *args):
    with open_fleet(folder) as fleet:
        return getattr(fleet, method)(*args)


def states(folder, name):
    return [key.state for key in table_of(folder).nodes[name]]


def test_a_crash_between_register_and_the_table_is_healed_by_the_next_command(folder, superlink):
    superlink.fails = {"after register"}
    key = new_key()
    with pytest.raises(UserError, match="does not answer"):
        change(folder, "admit", "site-a", key)
    assert table_of(folder).nodes == {}
    assert "is registered already" in change(folder, "admit", "site-a", key)
    assert table_of(folder).names_by_node(moment()) == {1000: "site-a"}


def test_a_crash_between_the_table_and_unregister_is_healed_by_the_next_command(folder, superlink):
    change(folder, "admit", "site-a", new_key())
    superlink.fails = {"unregister"}
    with pytest.raises(UserError, match="does not answer"):
        change(folder, "revoke", "site-a")
    assert table_of(folder).names_by_node(moment()) == {}, "a ServerApp refuses it from now on"
    assert superlink.rows[1000].is_registered
    change(folder, "settle")
    assert not superlink.rows[1000].is_registered and states(folder, "site-a") == [REVOKED]


def test_a_revoked_name_is_kept_and_comes_back_with_a_new_key_only(folder, superlink):
    old = new_key()
    change(folder, "admit", "site-a", old)
    change(folder, "revoke", "site-a")
    with pytest.raises(UserError, match=r"was revoked on 20.*Flower takes no key back"):
        change(folder, "admit", "site-a", old)
    with pytest.raises(UserError, match="the one of 'site-a'; each node has its own"):
        change(folder, "admit", "site-b", old)
    with pytest.raises(UserError, match="site-a was revoked already, on 20"):
        change(folder, "revoke", "site-a")
    assert "again, with a new key" in change(folder, "admit", "site-a", new_key())
    assert table_of(folder).names_by_node(moment()) == {1001: "site-a"}


def test_a_rotation_ends_when_the_new_key_was_seen_and_not_before(folder, superlink):
    change(folder, "admit", "site-a", new_key())
    superlink.connect(1000)
    change(folder, "rotate", "site-a", new_key(), 7)
    change(folder, "settle")
    assert table_of(folder).names_by_node(moment()) == {1000: "site-a", 1001: "site-a"}
    superlink.connect(1001)
    with open_fleet(folder) as fleet:
        (done,) = fleet.settled
    assert done.startswith("site-a: SHA256:") and done.endswith("the new key was seen.")
    assert states(folder, "site-a") == ["revoked", "admitted"]
    assert not superlink.rows[1000].is_registered and superlink.rows[1001].is_registered


def test_a_rotation_ends_at_its_date_although_the_new_key_was_never_seen(folder, superlink):
    change(folder, "admit", "site-a", new_key())
    change(folder, "rotate", "site-a", new_key(), 0)
    assert table_of(folder).names_by_node(moment()) == {1001: "site-a"}
    with open_fleet(folder) as fleet:
        assert "its time ended on" in fleet.settled[0]
    assert not superlink.rows[1000].is_registered


def test_what_is_refused(folder, superlink):
    first, second = new_key(), new_key()
    change(folder, "admit", "site-a", first)
    change(folder, "admit", "site-b", second)
    for method, args, words in (
        ("admit", ("site-a", new_key()), "has another key already.*fleet rotate site-a"),
        ("admit", ("site-c", first), "is the one of 'site-a'"),
        ("admit", ("no name", new_key()), "the node's name is 'no name'"),
        ("rotate", ("site-a", second, 7), "is known already, as 'site-b'"),
        ("rotate", ("site-q", new_key(), 7), "no node is named 'site-q'. Did you mean 'site-"),
        ("revoke", ("sitea",), "no node is named 'sitea'. Did you mean 'site-a'"),
    ):
        with pytest.raises(UserError, match=words):
            change(folder, method, *args)
    change(folder, "revoke", "site-b")
    with pytest.raises(UserError, match="site-b is revoked; `flexlora fleet add site-b"):
        change(folder, "rotate", "site-b", new_key(), 7)
    assert table_of(folder).names_by_node(moment()) == {1000: "site-a"}


def test_nodes_that_flowers_own_command_registered_are_adopted_by_their_names(folder, superlink):
    key, other = new_key(), new_key()
    superlink.register(key.pem, "site-a")
    superlink.register(other.pem, "")
    change(folder, "settle")
    assert table_of(folder).names_by_node(moment()) == {1000: "site-a"}
    superlink.register(new_key().pem, "site-a")
    change(folder, "settle")
    assert table_of(folder).names_by_node(moment()) == {1000: "site-a"}, "the name is taken"


def test_a_new_database_gets_the_keys_of_the_table_again(folder, superlink):
    for name in ("site-a", "site-b"):
        change(folder, "admit", name, new_key())
    change(folder, "revoke", "site-b")
    superlink.rows.clear()
    superlink.rows[7] = KnownNode(node_id=7, pem=b"", name="", status="unregistered", seen=None)
    (shown,) = change(folder, "register_again")
    assert shown == "site-a: node 1001, registered again."
    assert table_of(folder).names_by_node(moment()) == {1001: "site-a"}


def test_two_operators_do_not_change_the_table_at_once(folder):
    hold = (
        "import sys, pathlib; from flexlora.server.fleet.table import changing\n"
        "with changing(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    path = folder / "nodes" / "fleet.json"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        words = "another `flexlora fleet` is changing"
        with pytest.raises(UserError, match=words), changing(path, wait_seconds=0.2):
            pass
    finally:
        other.communicate()
    with changing(path):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to_is_said(folder):
    (folder / "nodes").chmod(0o555)
    with pytest.raises(UserError, match="cannot be written to"), changing(folder / "nodes" / "f"):
        pass


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 2, "nodes": {}}', '{"format": 1, "nodes": {"a": [{}]}}']
)
def test_a_damaged_table_is_one_sentence(folder, text):
    (folder / "nodes" / "fleet.json").write_text(text)
    with pytest.raises(UserError, match=r"is no table of nodes .*restore it from a backup"):
        table_of(folder)
