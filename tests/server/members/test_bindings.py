"""A client's name belongs to the key that registered it, or to the first node that used it."""

from __future__ import annotations

import json

import pytest

from faulty_grid import FaultyGrid, capability, people, run, settings
from federation import same_bytes
from flexlora.errors import UserError
from flexlora.runs.folder import RunFolder
from flexlora.server.fleet.table import RETIRING, REVOKED, FleetTable, NodeKey, moment
from flexlora.server.members.bindings import FLEET_VARIABLE, Bindings
from flexlora.server.strategy import FlexLoRAStrategy

LATER, EARLIER = "2999-01-01T00:00:00Z", "2000-01-01T00:00:00Z"


def key(node_id, **changes):
    return NodeKey(**{"public_key": f"key-{node_id}", "node_id": node_id, **changes})


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes ``{name: keys}`` as the table of this process."""
    path = tmp_path / "nodes" / "fleet.json"
    monkeypatch.setenv(FLEET_VARIABLE, str(path))

    def write(**nodes):
        FleetTable(nodes={name: tuple(keys) for name, keys in nodes.items()}).write(path)
        return path

    return write


def three(table, **changes):
    names = {name: [key(node_id)] for node_id, name in people(3).items()}
    return table(**{**names, **changes})


def lies(liar, victim):
    """Node of ``liar`` says that it is ``victim``."""
    return {liar: capability(victim)}


def test_a_node_that_uses_another_ones_name_is_left_out_and_both_are_named(table):
    """The liar has the lower node id: by the order of ids alone it would be the client."""
    three(table)
    rows = []
    grid = FaultyGrid(people(3), reports=lies("client_0", "client_1"))
    strategy = run(grid, rows=rows)
    assert {k: m.node_id for k, m in strategy.roster.members.items()} == {
        "client_1": 11,
        "client_2": 12,
    }
    cause = "node 10 (key of client_0) says it is client_1: left out"
    assert strategy.roster.left_out == {"client_0": cause}
    shown = [row["cause"] for row in rows if row["client_id"] == "client_1"]
    assert [said.split("; ")[0] for said in shown] == [cause, ""], "its owner reads it once"
    honest = run(FaultyGrid({11: "client_1", 12: "client_2"}))
    assert same_bytes(strategy.state, honest.state)


def test_a_name_is_kept_while_its_node_is_away(table):
    three(table)
    liar = FaultyGrid(people(3), reports=lies("client_0", "client_1"), away={11: [(0, 1e9)]})
    strategy = run(liar)
    assert set(strategy.roster.members) == {"client_2"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([key(99)], "node 11 says it is client_1, which is node 99: left out"),
        ([key(11, state=REVOKED)], "node 11 says it is client_1, which was revoked: left out"),
        ([key(11, state=RETIRING, until=EARLIER)], "which was revoked: left out"),
    ],
)
def test_a_key_that_the_table_does_not_admit_for_a_name_does_not_get_it(table, keys, words):
    three(table, client_1=keys)
    strategy = run(FaultyGrid(people(3)))
    assert set(strategy.roster.members) == {"client_0", "client_2"}
    assert words in strategy.roster.left_out["client_1 (node 11)"]


def test_a_node_beside_the_table_may_have_a_name_that_nobody_has(table):
    table(client_0=[key(10)])
    assert set(run(FaultyGrid(people(3))).roster.members) == set(people(3).values())


def test_during_a_rotation_both_keys_are_the_client(table):
    keys = [key(10, state=RETIRING, until=LATER), key(20)]
    table(client_0=keys)
    for node_id in (10, 20):
        grid = FaultyGrid({node_id: "client_0", 11: "client_1"})
        assert run(grid).roster.members["client_0"].node_id == node_id


def test_a_newcomer_with_a_false_name_is_left_out_in_the_round_it_came(table):
    three(table)
    grid = FaultyGrid(
        {10: "client_0", 11: "client_1"},
        later={12: (0.5, "client_2")},
        reports=lies("client_2", "client_1"),
    )
    rows = []
    strategy = run(grid, settings(num_server_rounds=3), rows=rows)
    assert strategy.roster.members["client_1"].node_id == 11
    (row,) = [row for row in rows if row["status"] == "left out"]
    assert (
        row["client_id"] == "client_2" and "(key of client_2) says it is client_1" in row["cause"]
    )


def test_a_revoke_during_a_run_takes_the_name_away(table):
    """The table is read again when nodes are looked at, not once a run."""
    path = three(table)
    bindings = Bindings(path)
    bindings.read()
    assert bindings.refusal(11, "client_1") == ""
    three(table, client_1=[key(11, state=REVOKED)])
    bindings.read()
    assert "was revoked" in bindings.refusal(11, "client_1")


def test_a_damaged_table_stops_a_start_and_no_run(table, caplog):
    path = three(table)
    bindings = Bindings(path)
    bindings.read()
    path.write_text(path.read_text()[:-20])
    bindings.read()
    assert bindings.name_of(11) == "client_1" and "the table read before is used" in caplog.text
    with pytest.raises(UserError, match="is no table of nodes"):
        run(FaultyGrid(people(3)))


def test_without_a_table_the_first_node_of_a_run_keeps_the_name_after_a_resume_too(tmp_path):
    config = settings()
    folder = RunFolder.create(tmp_path / "run", config)
    run(FaultyGrid({11: "client_1", 12: "client_2"}), config, run=folder)
    notes = json.loads((folder.checkpoint / "current.json").read_text())["notes"]
    assert notes["nodes"] == {"client_1": "11", "client_2": "12"}

    def again(nodes):
        strategy = FlexLoRAStrategy(config)
        strategy.membership.bindings.restore(folder.load_notes())
        strategy.meet(FaultyGrid(nodes))
        return strategy.roster

    both = again({10: "client_1", 11: "client_1", 12: "client_2"})
    assert both.members["client_1"].node_id == 11
    assert "node 11 is this client already" in both.left_out["client_1 (node 10)"]
    assert both.disputed["client_1"] == "node 10 says that it is this client too"
    alone = again({10: "client_1", 12: "client_2"})
    assert alone.members["client_1"].node_id == 10, "a node without a key is back under another id"


def test_two_nodes_with_one_name_are_both_told_and_the_second_goes_on_when_the_first_has_gone():
    grid = FaultyGrid(
        {11: "client_1", 12: "client_2"},
        later={10: (0.5, "client_1")},
        away={11: [(1.9, 1e9)]},
    )
    rows = []
    strategy = run(grid, settings(num_server_rounds=4), rows=rows)
    (shown,) = [row for row in rows if row["status"] == "left out"]
    assert shown["client_id"] == "client_1 (node 10)"
    assert shown["cause"].startswith("node 11 is this client already")
    noted = [row for row in rows if "node 10 says that it is this client too" in row["cause"]]
    assert [row["client_id"] for row in noted] == ["client_1"]
    assert strategy.roster.members["client_1"].node_id == 10
    assert strategy.roster.left_out == {}


def test_the_table_on_disk_holds_ids_of_64_bits_exactly(table):
    largest = 2**64 - 3
    path = table(client_0=[key(largest)])
    assert FleetTable.read(path).names_by_node(moment()) == {largest: "client_0"}
    assert json.loads(path.read_text())["nodes"]["client_0"][0]["node_id"] == str(largest)
