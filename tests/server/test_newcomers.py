"""Nodes that come after the first round, come back under another id, or answer late."""

from __future__ import annotations

import math

import pytest

from faulty_grid import SILENT, Fate, FaultyGrid, Told, capability, lost, people, run, settings
from flexlora.lora.ranks import RankClass
from flexlora.server.settings import rank_policy_of

LONG = {"num_server_rounds": 4}


def slow_rounds(seconds, client_id="client_0", rounds=range(1, 9)):
    """Fates that make every round last ``seconds``, so that something can happen meanwhile."""
    return {(server_round, client_id): [Fate(seconds=seconds)] for server_round in rounds}


def grown(*, reports=None, fates=None, later=None, shown=None, rows=None, **options):
    fates = {**slow_rounds(10.0), **(fates or {})}
    later = {99: (5.0, "zoe")} if later is None else later
    grid = FaultyGrid(people(3), fates, reports=reports, later=later, away=options.pop("away", {}))
    changes = options.pop("changes", LONG)
    return grid, run(grid, settings(**changes), rows=rows, observer=shown, **options)


def trained(rows, client_id):
    return [r["round"] for r in rows if r["client_id"] == client_id and r["status"] == "ok"]


def asked(grid, client_id):
    return [sent[3] for sent in grid.pushed if sent[0] == "query" and sent[2] == client_id]


def test_a_node_that_comes_later_takes_part_from_the_next_round_on():
    shown, rows = Told(), []
    grid, strategy = grown(shown=shown, rows=rows)
    assert trained(rows, "zoe") == [2, 3, 4] and trained(rows, "client_0") == [1, 2, 3, 4]
    policy = rank_policy_of(strategy.config)
    dealt = policy.assign([*people(3).values(), "zoe"])["zoe"]
    assert strategy.roster.members["zoe"].rank_class == dealt
    assert len(shown.of("met")) == 2 and len(asked(grid, "zoe")) == 1
    before = policy.assign(list(people(3).values()))
    kept = {k: m.rank_class for k, m in strategy.roster.members.items() if k != "zoe"}
    assert kept == before, "nobody else's rank changes"


def test_a_newcomer_that_the_checkpoint_knows_keeps_its_rank():
    own = RankClass(name="rank_3", rank=3)
    rows = []
    _, strategy = grown(rows=rows, rank_classes={"zoe": own})
    assert strategy.roster.members["zoe"].rank_class == own and trained(rows, "zoe") == [2, 3, 4]


UNFIT = {
    "version": ({"version": "3.0.1"}, "FlexLoRA 3.0.1, the server has"),
    "base": ({"fingerprint": "0" * 32}, "another base model"),
    "targets": ({"modules": ("x",), "out_features": (4,), "in_features": (4,)}, "other targets"),
    "shapes": (
        {"out_features": (12, 6, 21)},
        "module 'mlp.up': [out, in] is [21, 12]",
    ),
    "its own word": ({"cause": "its disk is full"}, "its disk is full"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_newcomer_that_does_not_fit_is_left_out_once_with_its_cause(kind):
    change, cause = UNFIT[kind]
    shown, rows = Told(), []
    grid, strategy = grown(reports={"zoe": capability("zoe", **change)}, shown=shown, rows=rows)
    (row,) = [row for row in rows if row["client_id"] == "zoe"]
    assert (row["round"], row["status"]) == (2, "left out") and cause in row["cause"]
    assert "zoe" not in strategy.roster.members and len(shown.of("met")) == 1
    assert len(asked(grid, "zoe")) == 1, "it answered: nobody asks again while it stays"
    assert rows[-1]["metrics"]["clients_failed"] == 0


def test_one_that_was_repaired_is_asked_again_once_it_has_been_away():
    class Repaired(FaultyGrid):
        def answer(self, message):
            fixed = self.clock.now() > 25.0
            self.reports = {} if fixed else {"zoe": capability("zoe", version="3.0.1")}
            return super().answer(message)

    rows = []
    away = {99: [(15.0, 25.5)]}
    grid = Repaired(people(3), slow_rounds(10.0), later={99: (5.0, "zoe")}, away=away)
    run(grid, settings(num_server_rounds=5), rows=rows)
    statuses = [(row["round"], row["status"]) for row in rows if row["client_id"] == "zoe"]
    assert statuses[0] == (2, "left out") and trained(rows, "zoe") == [4, 5]


def test_a_node_that_did_not_answer_at_first_is_asked_again_and_less_and_less():
    rows = []
    config = {"num_server_rounds": 8, "server__round_timeout_seconds": 20.0}
    fates = {("query", "client_1"): [lost(8, 0.0)] * 3 + [SILENT] * 9}  # then in rounds 1, 3, 7
    grid, strategy = grown(fates=fates, later={}, rows=rows, changes=config)
    assert strategy.roster.left_out["node_11"].startswith("Flower error 8")
    times = asked(grid, "client_1")
    assert len(times) == 6 and trained(rows, "client_1") == []
    fates = {("query", "client_1"): [lost(8, 0.0)] * 4}
    grid, strategy = grown(fates=fates, later={}, rows=rows, changes=config)
    assert trained(rows, "client_1") == [3, 4, 5, 6, 7, 8]
    assert strategy.roster.left_out == {}


def test_a_slow_answer_holds_up_no_round_for_long_and_counts_when_it_is_there():
    rows = []
    grid, _ = grown(fates={("query", "zoe"): [Fate(seconds=35.0)]}, rows=rows)
    assert trained(rows, "zoe") == [3, 4]
    began = [sent[3] for sent in grid.pushed if sent[0] == "train" and sent[2] == "client_0"]
    assert 40.0 <= began[1] - began[0] <= 42.0 and began[2] - began[1] <= 12.0


def test_who_is_back_under_another_id_is_the_same_client():
    rows = []
    grid, strategy = grown(later={99: (15.0, "client_1")}, away={11: [(12.0, math.inf)]}, rows=rows)
    assert trained(rows, "client_1") == [1, 2, 3, 4]
    assert strategy.roster.members["client_1"].node_id == 99 and len(strategy.roster.members) == 3
    nodes = [sent[4] for sent in grid.pushed if sent[0] == "train" and sent[2] == "client_1"]
    assert nodes == [11, 11, 99, 99]


def test_a_second_node_of_a_client_waits_until_the_first_has_gone():
    """A SuperNode that was killed is taken to be there for up to a minute."""
    rows = []
    grid, strategy = grown(later={99: (5.0, "client_1")}, away={11: [(25.0, math.inf)]}, rows=rows)
    nodes = [sent[4] for sent in grid.pushed if sent[0] == "train" and sent[2] == "client_1"]
    assert nodes[:2] == [11, 11] and nodes[-1] == 99 and len(asked(grid, "client_1")) == 2
    assert trained(rows, "client_1") == [1, 2, 3, 4] and len(strategy.roster.members) == 3


def test_a_newcomer_that_the_table_of_ranks_does_not_name_is_left_out(tmp_path):
    table = tmp_path / "ranks.csv"
    table.write_text("client_id,rank\n" + "".join(f"{name},2\n" for name in people(3).values()))
    rows = []
    changes = {**LONG, "ranks__policy": "file", "ranks__file": str(table)}
    _, strategy = grown(rows=rows, changes=changes)
    (row,) = [row for row in rows if row["client_id"] == "zoe"]
    assert row["status"] == "left out" and "has no entry for client 'zoe'" in row["cause"]
    assert len(strategy.roster.members) == 3 and strategy.state.round == 4


def test_a_node_without_a_client_app_delays_the_start_by_wait_seconds_and_is_named():
    """The round's time is 100 s; the clock is the grid's."""
    shown, rows = Told(), []
    fates = {("query", "client_1"): [SILENT] * 9}
    grid = FaultyGrid(people(3), fates)
    changes = {"num_server_rounds": 2, "server__wait_seconds": 40.0, "server__resends": 0}
    run(grid, settings(**changes), rows=rows, observer=shown)
    first = min(sent[3] for sent in grid.pushed if sent[0] == "train")
    assert 40.0 <= first < 45.0
    assert trained(rows, "client_0") == [1, 2] and trained(rows, "client_1") == []
    said = [(what, seconds) for what, seconds in shown.of("waiting") if "ClientApp" in what]
    assert all(what.endswith(": 11") for what, _ in said), "by its node id"
    lefts = [seconds for _, seconds in said[:4]]
    assert lefts == pytest.approx([38.0, 34.0, 26.0, 10.0], abs=1.0)
    assert "no answer to the query within 40 s" in shown.of("met")[0][0].left_out["node_11"]


def test_its_answer_is_read_when_it_comes_and_it_joins():
    """No second query is needed: that to the meeting is answered in round 1."""
    rows = []
    fates = {("query", "client_1"): [Fate(seconds=45.0), SILENT]} | slow_rounds(20.0)
    grid = FaultyGrid(people(3), fates)
    changes = {**LONG, "server__wait_seconds": 40.0, "server__resends": 0}
    run(grid, settings(**changes), rows=rows)
    assert trained(rows, "client_1") == [2, 3, 4]


def test_a_run_says_how_many_nodes_it_waits_for_and_who_is_not_connected():
    shown = Told()
    away = {10: [(0.0, 20.0)]}  # node 10 is away for 20 s at the start, node 11 after round 1
    grid = FaultyGrid(people(2), away={**away, 11: [(22.0, 60.0)]}, fates=slow_rounds(2.0))
    changes = {"num_server_rounds": 2, "server__min_nodes": 2, "server__quorum": 2}
    run(grid, settings(**changes), observer=shown)
    said = [what for what, _ in shown.of("waiting")]
    assert said[0] == "nodes, 1 of 2 are connected"
    assert "1 more clients to be connected: client_1" in said
