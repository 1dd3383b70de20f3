"""Messages that are lost are sent again, and however often they are answered they count once."""

from __future__ import annotations

import logging
import math

import pytest
from flwr.app import Message, RecordDict
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from faulty_grid import REPLY, SILENT, Fate, FaultyGrid, Told, lost, people, run, settings
from federation import StopAt, same_bytes
from flexlora.aggregation import make_method
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.starts import Factoring
from flexlora.aggregation.engine.updates import Update
from flexlora.runs.outcomes import Outcome
from flexlora.server.observing.observer import LogObserver
from flexlora.server.transport.exchange import exchange
from flexlora.server.transport.flower_private import ObjectPushError, set_message_id
from flexlora.server.transport.retry_queue import PendingMessage, RetryPolicy
from flexlora.wire.encoding import over_the_wire
from one_round import distance, no_change, same_bits

ONE = {"num_server_rounds": 1, "server__skipped_rounds": 0}
TWICE = RetryPolicy(resends=2, silence_seconds=40.0, patience_seconds=60.0)


def one_round(fates, count=3, *, away=None, shown=None, **changes):
    """One round with these fates in it: the grid, the strategy, the rows by client."""
    grid = FaultyGrid(people(count), {(1, k): v for k, v in fates.items()}, away=away)
    rows = []
    strategy = run(grid, settings(**{**ONE, **changes}), rows=rows, observer=shown)
    return grid, strategy, {row["client_id"]: row for row in rows}


@pytest.fixture(scope="module")
def honest():
    """The round in which nothing is lost."""
    return one_round({})


RECOVERED = {
    "code 5": ([lost(5)], "sent 2 times (code 5)"),
    "code 8": ([lost(8)], "sent 2 times (code 8)"),
    "a reply that expired": ([lost(4)], "sent 2 times (code 4)"),
    "a message that is gone": ([lost(3)], "sent 2 times (code 3)"),
    "silence": ([SILENT], "sent 2 times (silent for 40 s)"),
    "twice": ([lost(5), lost(8)], "sent 3 times (code 5, code 8)"),
    "a trainer that restarts": ([Fate(passing="no trainer")], "sent 2 times (no trainer)"),
    "that, then code 8": ([Fate(passing="busy"), lost(8)], "sent 3 times (busy, code 8)"),
    "silence, then an error": ([Fate(seconds=60.0, code=5), lost(8), REPLY], "sent 3 times"),
}


@pytest.mark.parametrize("fault", RECOVERED)
def test_a_lost_message_is_sent_again_and_the_round_is_whole(fault, honest):
    fates, note = RECOVERED[fault]
    shown = Told()
    grid, strategy, rows = one_round({"client_1": fates}, shown=shown)
    assert same_bytes(strategy.state, honest[1].state)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["client_1"]["cause"].startswith(note) and rows["client_0"]["cause"] == ""
    copies = len(grid.copies(1, "client_1"))
    assert copies >= 2 and len(grid.copies(1, "client_0")) == 1
    assert rows["client_1"]["metrics"]["resent"] == copies - 1
    assert [args[:2] for args in shown.of("resent")] == [
        ["client_1", k + 2] for k in range(copies - 1)
    ]
    assert ["client_1", Outcome.OK, "", False] in shown.of("replied")


def test_the_log_has_a_line_for_it_and_an_observer_need_not_know_of_it(caplog):
    caplog.set_level(logging.INFO)
    one_round({"client_1": [lost(5)]}, shown=LogObserver(logging.getLogger("a run")))
    assert "client client_1: sent again (2), code 5" in caplog.messages
    assert any(", resent 1," in line for line in caplog.messages)
    seen = StopAt("never", 0)
    _, strategy, _ = one_round({"client_1": [lost(5)]}, shown=seen)
    assert seen.current == 1 and strategy.state.round == 1


def test_what_goes_down_again_is_counted_and_nothing_is_said_where_nothing_was_lost(honest):
    _, _, rows = one_round({"client_1": [lost(5)]})
    more, once = (r["client_1"]["metrics"] for r in (rows, honest[2]))
    mine = rows["client_1"]["bytes_down"]
    assert mine == 2 * honest[2]["client_1"]["bytes_down"]
    assert more["bytes_down"] == once["bytes_down"] + mine // 2
    assert more["bytes_down"] == sum(row["bytes_down"] for row in rows.values())
    assert "resent" not in once and "backing_off" not in once


def test_the_pause_before_a_copy_grows():
    grid, _, _ = one_round({"client_1": [lost(5, 0.0), lost(5, 0.0)]})
    first, second, third = grid.copies(1, "client_1")
    assert 1.0 <= second - first <= 2.0 and 2.0 <= third - second <= 3.0


@pytest.mark.parametrize("code", [0, 1, 2, 6, 7])
def test_a_failure_of_the_clients_own_is_not_repeated(code):
    grid, _, rows = one_round({"client_1": [lost(code)] if code else [Fate(code=99)]})
    assert len(grid.copies(1, "client_1")) == 1
    assert rows["client_1"]["status"] == "failed" and "sent" not in rows["client_1"]["cause"]


@pytest.mark.parametrize("resends", [0, 1, 2])
def test_no_more_copies_than_allowed_and_the_last_error_is_the_cause(resends):
    grid, strategy, rows = one_round({"client_1": [lost(5)] * 9}, server__resends=resends)
    assert len(grid.copies(1, "client_1")) == resends + 1
    row = rows["client_1"]
    assert row["status"] == "failed" and row["cause"].startswith("Flower error 5: as written")
    assert ("sent" in row["cause"]) == (resends > 0)
    if resends == 2:
        assert row["cause"].endswith("sent 3 times (code 5, code 5)")
    assert strategy.state.round == 1 and rows["client_0"]["status"] == "ok"


def test_both_copies_answered_count_once(honest):
    """The first is slow, so that a second goes out; both are answered, the first before."""
    fates = {"client_1": [Fate(seconds=41.0), Fate(seconds=2.0)], "client_2": [Fate(seconds=60.0)]}
    grid, strategy, rows = one_round(fates)
    assert len(grid.copies(1, "client_1")) == 2
    assert same_bytes(strategy.state, honest[1].state)
    assert rows["client_1"]["metrics"]["clients_ok"] == 3
    assert rows["client_1"]["metrics"]["clients_failed"] == 0


def test_the_second_copys_reply_counts_if_it_comes_first(honest):
    fates = {"client_1": [Fate(seconds=90.0), Fate(seconds=2.0)], "client_2": [Fate(seconds=95.0)]}
    _, strategy, rows = one_round(fates)
    assert same_bytes(strategy.state, honest[1].state)
    assert rows["client_1"]["status"] == "ok"


def test_a_node_that_is_gone_is_sent_nothing_until_it_is_back(honest):
    grid, strategy, rows = one_round({}, away={11: [(0.5, 50.0)]})
    assert same_bytes(strategy.state, honest[1].state)
    _, second = grid.copies(1, "client_1")
    assert 50.0 <= second <= 52.0 and rows["client_1"]["status"] == "ok"


def test_a_node_that_does_not_come_back_is_waited_for_only_so_long():
    grid, _, rows = one_round({}, away={11: [(0.5, math.inf)]})
    assert len(grid.copies(1, "client_1")) == 1 and 60.0 <= grid.clock.now() <= 65.0
    cause = rows["client_1"]["cause"]
    assert cause.startswith("Flower error 5") and cause.endswith(
        "not sent again, as the node was not there"
    )
    assert rows["client_1"]["metrics"]["clients_ok"] == 2


def test_a_node_that_is_back_under_another_id_is_found_by_its_client(honest):
    """A SuperNode without a registered key gets a new id each time it starts."""
    grid = FaultyGrid(people(3), away={11: [(0.5, math.inf)]}, later={99: (20.0, "client_1")})
    rows = []
    strategy = run(grid, settings(**ONE), rows=rows)
    assert same_bytes(strategy.state, honest[1].state)
    assert strategy.roster.members["client_1"].node_id == 99
    assert [sent[4] for sent in grid.pushed if sent[2] == "client_1" and sent[0] == "train"] == [
        11,
        99,
    ]
    assert {row["status"] for row in rows} == {"ok"}


def test_no_copy_goes_out_after_the_deadline():
    grid, _, rows = one_round({"client_1": [SILENT] * 9}, server__resends=9)
    sent = grid.copies(1, "client_1")
    assert len(sent) == 3 and max(sent) < 100.0 and grid.clock.now() <= 101.0
    assert rows["client_1"]["cause"].startswith(
        "no reply within 100 s; sent 3 times (silent for 40 s"
    )


def test_silence_is_half_of_the_rounds_time_if_nothing_is_set():
    grid, _, _ = one_round({"client_1": [SILENT]}, server__silence_seconds=0.0)
    first, second = grid.copies(1, "client_1")
    assert 50.0 <= second - first <= 51.0


def test_an_answer_after_the_deadline_counts_in_the_next_round_once():
    """Two copies are out when the round ends; both come, in the round after."""
    fates = {
        (1, "client_1"): [Fate(seconds=105.0), Fate(seconds=70.0)],
        (2, "client_0"): [Fate(seconds=20.0)],
    }
    grid, rows = FaultyGrid(people(3), fates), []
    run(grid, settings(server__resends=1), rows=rows)
    mine = [row for row in rows if row["client_id"] == "client_1"]
    assert [(row["round"], row["status"]) for row in mine] == [(1, "failed"), (2, "ok"), (2, "ok")]
    assert sum(row["cause"] == "late: trained from round 0" for row in mine) == 1


def test_below_the_quorum_nothing_changes_and_resending_may_save_it(honest):
    """All lost once: the copies make the quorum. All lost for good: the round is skipped."""
    everybody = {f"client_{k}": [lost(5)] for k in range(3)}
    _, strategy, rows = one_round(everybody, server__quorum=3)
    assert same_bytes(strategy.state, honest[1].state)
    gone = {f"client_{k}": [lost(5)] * 9 for k in range(3)}
    _, strategy, rows = one_round(gone, server__quorum=3)
    assert "updates came" in rows["client_0"]["metrics"]["skipped"]
    assert same_bits(strategy.state.change, no_change(strategy.roster.shapes).change)
    assert strategy.state.round == 1


def test_enough_updates_end_the_round_while_a_copy_is_still_due():
    """Over-selection: who lost a message need not be waited for."""
    away = {11: [(0.5, math.inf)]}
    changes = {"fraction_train": 0.5, "server__over_selection": 0.5}
    grid, _, rows = one_round({}, 4, away=away, **changes)
    assert len(rows) == 3 and grid.clock.now() < 10.0
    unneeded = [row for row in rows.values() if row["status"] == "not needed"]
    assert len(unneeded) == 1 and unneeded[0]["cause"].startswith("2 updates came first")


@pytest.mark.parametrize(
    ("ttl", "late_rounds", "lives"),
    [(0.0, 1, [200.0, 158.5]), (0.0, 0, [100.0, 58.5]), (33.0, 1, [33.0, 33.0])],
)
def test_a_message_lives_for_its_round_and_as_long_as_it_may_be_late(ttl, late_rounds, lives):
    changes = {"server__message_ttl_seconds": ttl, "server__late_rounds": late_rounds}
    grid, _, _ = one_round({"client_1": [SILENT]}, **changes)
    ttls = [sent[5] for sent in grid.pushed if sent[0] == "train" and sent[2] == "client_1"]
    assert ttls == pytest.approx(lives, abs=2.0)


def letters(grid):
    return [
        PendingMessage(Message(RecordDict(), dst_node_id=node, message_type="query"))
        for node in grid.clients
    ]


class Repeating(FaultyGrid):
    """Delivers every reply twice, in one pull and again in every later one."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.given = {}

    def pull_messages(self, message_ids):
        for key in message_ids:
            if key not in self.given:
                fresh = super().pull_messages([key])
                if fresh:
                    self.given[key] = fresh * 2
        return [reply for key in message_ids for reply in self.given.get(key, [])]


def test_exchange_hands_on_every_letter_once_though_each_reply_comes_twice():
    grid = Repeating(people(4))
    got = list(exchange(grid, letters(grid), timeout=50.0, policy=TWICE))
    assert sorted(letter.node_id for letter, _ in got) == sorted(grid.clients)
    assert all(reply is not None and letter.answered for letter, reply in got)


def test_without_resending_an_error_is_the_answer_and_nothing_goes_out_twice():
    grid = FaultyGrid(people(2), away={11: [(0.0, math.inf)]})
    got = {letter.node_id: reply for letter, reply in exchange(grid, letters(grid), timeout=50.0)}
    assert got[11].has_error() and got[11].error.code == 5 and not got[10].has_error()
    assert len(grid.pushed) == 2 and grid.clock.now() < 5.0


def test_a_node_that_the_superlink_does_not_know_is_no_answer():
    grid = FaultyGrid(people(1))
    unknown = PendingMessage(Message(RecordDict(), dst_node_id=404, message_type="query"))
    got = list(exchange(grid, [unknown], timeout=5.0))
    assert got == [(unknown, None)]
    patient = PendingMessage(Message(RecordDict(), dst_node_id=404, message_type="query"))
    assert list(exchange(grid, [patient], timeout=90.0, policy=TWICE)) == [(patient, None)]
    assert 60.0 <= grid.clock.now() <= 65.0


class Breaking(FaultyGrid):
    """A slow SuperLink: the upload of the first train messages breaks off half-way."""

    broken = False

    def push_messages(self, messages):
        messages = list(messages)
        if messages[0].metadata.message_type == "train" and not self.broken:
            self.broken = True
            super().push_messages(messages[:1])
            raise ObjectPushError("object", 1, "session")
        return super().push_messages(messages)


def test_an_upload_that_breaks_off_is_a_lost_message_and_not_the_end_of_the_run(honest):
    grid, rows = Breaking(people(len(honest[2]))), []
    strategy = run(grid, settings(**ONE), rows=rows)
    assert grid.broken and same_bytes(strategy.state, honest[1].state)
    assert {row["cause"] for row in rows} == {"sent 2 times (its upload broke off)"}


def reply_of(grid, message):
    set_message_id(message, f"pushed-{message.metadata.dst_node_id}")
    return grid.answer(message)


def test_a_reply_counts_once_and_one_to_nothing_never(honest, caplog):
    """``aggregate_train`` is public: replies may reach it without any of our exchange."""
    grid = FaultyGrid(people(3))
    strategy = run(grid, settings(num_server_rounds=1, server__resends=0), rows=[])
    fresh = type(strategy)(strategy.config, state=no_change(strategy.roster.shapes))
    fresh.meet(grid)
    messages = fresh.configure_train(1, None, None, grid)
    replies = [reply_of(grid, message) for message in messages]
    stranger = Message(RecordDict(), dst_node_id=10, message_type="train", group_id="1")
    set_message_id(stranger, "of an older run")
    nothing = Message(replies[0].content, reply_to=stranger)
    fresh.aggregate_train(1, [nothing, replies[0], *replies, nothing])
    assert same_bytes(fresh.state, honest[1].state)
    assert [row.outcome for row in fresh.metrics.rows] == [Outcome.OK] * 3
    shown = [record.getMessage() for record in caplog.records]
    assert (
        sum("a reply to nothing that was sent in round 1, dropped" in line for line in shown) == 2
    )
    assert sum(line.startswith("client_0: a second reply") for line in shown) == 1


def exact(grid, strategy, counted):
    """The round with only these clients, from what they trained, without any server around it."""
    method, state = make_method("residual"), no_change(strategy.roster.shapes)
    factoring = Factoring(alpha=strategy.config.lora.alpha)
    sent = {}
    for name, rank_class in strategy.roster.rank_classes.items():
        start = method.start(state, rank_class, factoring)
        sent[name] = type(start)(
            **{**vars(start), "trained": over_the_wire(start.trained, "float64")}
        ).sealed()
    opened = OpenRound(method, state, sent, most_updates=len(counted))
    for client_id in counted:
        result = grid.results[1, client_id]
        opened.add(
            Update(
                client_id=client_id,
                adapter=result.adapter,
                num_examples=result.num_examples,
                rank_class=result.rank_class,
                digest=result.digest,
            )
        )
    return opened.close()


fate = st.one_of(
    st.builds(lost, st.sampled_from([3, 4, 5, 8]), st.floats(0.0, 120.0)),
    st.just(SILENT),
    st.builds(lambda seconds: Fate(seconds=seconds), st.floats(0.0, 150.0)),
)
spans = st.lists(st.tuples(st.floats(0.5, 90.0), st.floats(1.0, 80.0)), max_size=1)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    fates=st.lists(st.lists(fate, max_size=4), min_size=4, max_size=4),
    spells=st.lists(spans, min_size=4, max_size=4),
    quorum=st.integers(1, 4),
)
def test_any_losses_delays_and_copies_give_the_exact_round_of_those_that_answered(
    fates, spells, quorum
):
    away = {10 + k: [(t, t + s) for t, s in spell] for k, spell in enumerate(spells)}
    script = {f"client_{k}": row for k, row in enumerate(fates)}
    grid, strategy, rows = one_round(script, 4, away=away, server__quorum=quorum)
    counted = sorted(name for name, row in rows.items() if row["status"] == "ok")
    assert len(rows) == 4 and strategy.state.round == 1
    assert all(row["cause"] for row in rows.values() if row["status"] != "ok")
    assert all(len(grid.copies(1, name)) <= 3 for name in script)
    if len(counted) < quorum:
        assert same_bits(strategy.state.change, no_change(strategy.roster.shapes).change)
    else:
        expected = exact(grid, strategy, counted)
        dense = {n: expected.change[n].to_dense() for n in expected.change}
        assert distance(strategy.state.change, dense) < 1e-12
