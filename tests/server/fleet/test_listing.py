"""What ``flexlora fleet list`` shows: the table, the SuperLink's view and the run's own file."""

from __future__ import annotations

import base64
import json
import os

import pytest

from faulty_grid import SILENT, FaultyGrid, capability, people, run, settings
from fleet_fakes import new_key
from flexlora.commands.cli import main
from flexlora.errors import UserError
from flexlora.runs.members_file import MEMBERS_FILE, read_members
from flexlora.server.fleet.listing import newest_members, read_refused
from flexlora.server.fleet.operations import open_fleet
from flexlora.server.observing.members import MembersObserver


@pytest.fixture
def listed(folder, capsys):
    """``fleet list --json`` by name, and the lines of the table."""

    def read(*words):
        capsys.readouterr()
        assert main(["fleet", "list", "--server", str(folder), "--json", *words]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert main(["fleet", "list", "--server", str(folder), *words]) == 0
        return {row["name"]: row for row in printed["nodes"]}, capsys.readouterr().out.splitlines()

    return read


def admitted(folder, *names):
    keys = {name: new_key() for name in names}
    with open_fleet(folder) as fleet:
        for name, key in keys.items():
            fleet.admit(name, key)
    return keys


def log_attempt(folder, key, status=412, address="192.0.2.7", when="2026-11-30T12:00:00+01:00"):
    (folder / "state").mkdir(exist_ok=True)
    with (folder / "state" / "refused.log").open("a") as file:
        header = base64.b64encode(key.pem).decode()
        file.write(f"{when} {address} {status} {header}\n")


def test_a_run_writes_who_its_clients_are_and_the_list_shows_it(folder, superlink, listed):
    names = people(4)
    admitted(folder, *names.values())
    ids = list(superlink.rows)
    place = folder / "state" / "serverapp" / "runs" / "1"
    place.mkdir(parents=True)
    grid = FaultyGrid(
        dict(zip(ids, names.values(), strict=True)),
        {(2, "client_1"): [SILENT] * 9},
        reports={"client_3": capability("client_3", version="9.0.0")},
    )
    run(grid, settings(num_server_rounds=2), observer=MembersObserver(place))
    superlink.connect(ids[0])
    rows, lines = listed()
    first, second, fourth = (rows[f"client_{k}"] for k in (0, 1, 3))
    assert (first["state"], first["device"]) == ("online", "cpu")
    assert first["last_seen"] == "2026-11-30T12:00:00Z" and first["last_reply"].startswith("20")
    assert first["rank_class"] in ("rank_2", "rank_4") and first["why"] == ""
    assert second["why"].startswith("round 2: silent, no reply within")
    assert "FlexLoRA 9.0.0, the server has" in fourth["why"] and fourth["last_reply"] == ""
    assert lines[0].split()[:3] == ["NAME", "KEY", "CLASS"] and len(lines) == 5


def test_the_newest_run_counts_and_another_nodes_notes_do_not(folder, superlink, listed):
    admitted(folder, "client_0")
    for number, node_id in ((1, "1000"), (2, "77")):
        file = folder / "state" / "serverapp" / "runs" / str(number) / MEMBERS_FILE
        file.parent.mkdir(parents=True)
        row = {"node_id": node_id, "device": f"card {number}"}
        file.write_text(json.dumps({"format": 1, "members": {"client_0": row}, "left_out": {}}))
        os.utime(file, (number, number))
    assert newest_members(folder)["members"]["client_0"]["device"] == "card 2"
    assert listed()[0]["client_0"]["device"] == "", "the run's client_0 was another node"
    elsewhere = folder / "state" / "serverapp" / "runs"
    os.utime(elsewhere / "1" / MEMBERS_FILE, (3, 3))
    assert listed("--runs", str(elsewhere))[0]["client_0"]["device"] == "card 1"


def test_a_revoked_key_that_tries_again_is_named_and_others_are_not(folder, listed):
    keys = admitted(folder, "site-a", "site-b")
    with open_fleet(folder) as fleet:
        fleet.revoke("site-a")
    log_attempt(folder, keys["site-a"])
    log_attempt(folder, keys["site-a"], when="2026-11-30T13:00:00+01:00", address="192.0.2.8")
    log_attempt(folder, keys["site-b"], status=401)
    with (folder / "state" / "refused.log").open("a") as file:
        file.write("garbage\n2026-11-30T13:00:00+01:00 1.2.3.4 412 bm8ga2V5\n\x00\xff\n")
    rows, _ = listed()
    assert rows["site-a"]["state"] == "revoked"
    words = "tried to connect 2 times, last on 2026-11-30T12:00:00Z from 192.0.2.8, refused"
    assert rows["site-a"]["why"].endswith(words)
    assert rows["site-b"]["why"] == ""
    assert len(read_refused(folder)) == 2


def test_without_a_superlink_the_table_is_shown_and_says_so(folder, superlink, listed, monkeypatch):
    admitted(folder, "site-a")

    def silent():
        raise UserError("the SuperLink at 127.0.0.1:1 does not answer")

    monkeypatch.setattr(superlink, "nodes", silent)
    rows, lines = listed()
    assert rows["site-a"]["state"] == "unknown"
    assert lines[0].startswith("Without the SuperLink's view: the SuperLink at 127.0.0.1:1")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1, "members": []}'])
def test_a_damaged_file_of_a_run_hides_nothing_else(tmp_path, text):
    (tmp_path / MEMBERS_FILE).write_text(text)
    assert read_members(tmp_path / MEMBERS_FILE) == {"written": "", "members": {}, "left_out": {}}
