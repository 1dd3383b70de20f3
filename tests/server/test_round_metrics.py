"""The rows of a round: whose seconds and joules they hold, and what sampling learns of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from faulty_grid import capability
from flexlora.lora.ranks import RankClass
from flexlora.runs.outcomes import Outcome
from flexlora.server.members.roster import Member
from flexlora.server.members.sampling import History
from flexlora.server.rounds.client_rows import ClientRow
from flexlora.server.rounds.round_metrics import EQUAL_SECONDS, RoundMetrics
from flexlora.server.transport.clocks import Spent
from flexlora.wire.jobs import TrainResult


class FiveSeconds:
    """A clock that knows of everybody's last training that it took 5 s and 7 J."""

    simulated = True

    def spent(self, client_id):
        return Spent(seconds=5.0, joules=7.0)

    def downloaded(self, client_id):
        return 0.25 if client_id == "gone" else 1.0


def metrics_of(*rows, server_round=3, **options):
    """Round metrics with a row per ``(client id, outcome, cause, loss)``."""
    metrics = RoundMetrics(server_round=server_round, **options)
    for client_id, outcome, cause, loss in rows:
        member = Member(node_id=1, capability=capability(client_id), rank_class=RankClass.of(4))
        result = TrainResult(
            client_id=client_id,
            rank_class="rank_4",
            base_round=server_round - 1,
            digest="",
            num_examples=3,
            train_loss=loss,
            train_seconds=100 * loss,
        )
        row = ClientRow.of(member, server_round, Outcome(outcome), cause)
        row.add_result(result)
        row.bytes_down = row.bytes_up = 1
        metrics.rows.append(row)
    return metrics


@pytest.mark.parametrize(
    "cause", ["", "data.template 'alpaca' cannot be rendered", "late night; no reply within 9 s"]
)
def test_a_row_has_its_seconds_and_joules_whatever_its_cause_says(cause):
    metrics = metrics_of(("a", "ok", "", 1.0), ("b", "failed", cause, 1.0))
    values = metrics.apply_clock(FiveSeconds(), 9.0)
    assert [(row.simulated_seconds, row.joules) for row in metrics.rows] == [(5.0, 7.0)] * 2
    assert values == {"simulated_seconds": 9.0, "joules": 14.0, "bytes_down": 2}


def test_of_what_was_sent_only_the_share_counts_that_had_come_before_a_client_left():
    metrics = metrics_of(("a", "ok", "", 1.0), ("gone", "failed", "left", 1.0))
    for row in metrics.rows:
        row.bytes_down = 1000
    assert metrics.apply_clock(FiveSeconds(), 9.0)["bytes_down"] == 1250
    assert [row.bytes_down for row in metrics.rows] == [1000, 250]


def test_a_late_row_has_its_own_seconds_and_no_joules_twice():
    metrics = metrics_of(("a", "ok", "late: trained from round 1", 1.0))
    metrics.rows[0].late, metrics.rows[0].simulated_seconds = True, 120.0
    metrics.rows += metrics_of(("a", "ok", "", 1.0)).rows
    assert metrics.apply_clock(FiveSeconds(), 9.0)["joules"] == 7.0
    assert [row.simulated_seconds for row in metrics.rows] == [120.0, 5.0]
    assert math.isnan(metrics.rows[0].joules)


def learned(metrics):
    history = History()
    metrics.update_history(history)
    return history.last


def test_seconds_are_the_clients_own_the_simulated_ones_or_alike_never_this_process_s():
    rows = [("a", "ok", "", 1.0), ("b", "ok", "", 2.0), ("c", "failed", "", 3.0)]
    measured = metrics_of(*rows)
    assert learned(measured) == {"a": (3, 1.0, 100.0), "b": (3, 2.0, 200.0)}
    untimed = metrics_of(*rows, measured=False)
    assert learned(untimed) == {"a": (3, 1.0, EQUAL_SECONDS), "b": (3, 2.0, EQUAL_SECONDS)}
    simulated = metrics_of(*rows, measured=False)
    simulated.apply_clock(FiveSeconds(), 9.0)
    assert learned(simulated) == {"a": (3, 1.0, 5.0), "b": (3, 2.0, 5.0)}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_updates_that_which_was_asked_for_now_is_remembered(order):
    late = metrics_of(("a", "ok", "late: trained from round 1", 9.0))
    late.rows[0].late = True
    prompt = metrics_of(("a", "ok", "", 2.0))
    rows = [*late.rows, *prompt.rows]
    both = replace(prompt, rows=[rows[k] for k in order])
    assert learned(both) == {"a": (3, 2.0, 200.0)}
