"""What became of a client is a value: whatever a cause says, it is counted as what it was."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message
from prometheus_client import CollectorRegistry

from faulty_grid import SILENT, Fate, FaultyGrid, Told, people, settings
from faulty_grid import run as faulty_run
from federation import TamperingGrid, client_rows, federation, small
from flexlora.clients.worker import worker_for
from flexlora.config.resolve import Config
from flexlora.runs.live_state import read_live
from flexlora.runs.outcomes import Outcome
from flexlora.server.observing.prometheus import PrometheusObserver


def lost(reply, message):
    return [Message(Error(code=5, reason="the node is gone"), reply_to=message)]


def crashed(reply, message):
    return [Message(Error(code=2, reason="it raised"), reply_to=message)]


def claiming(reply, message):
    reply.content["report"]["num-examples"] = 10**6
    return [reply]


def without_memory(reply, message):
    reply.content["report"]["out-of-memory"] = True
    return failing("no room")(reply, message)


def unreadable(reply, message):
    del reply.content["report"]["packed/modules"]
    return [reply]


def failing(cause):
    def tamper(reply, message):
        reply.content["report"]["cause"] = cause
        return [reply]

    return tamper


def observed(tamper, tmp_path):
    """A round with one tampered client: its row, live.json, the Prometheus counts, the victim."""
    config, registry = small(), CollectorRegistry()
    worker = worker_for(config)
    victim = sorted(worker.client_ids)[1]
    grid = TamperingGrid(worker, tamper=tamper, victims=[victim])
    observer = PrometheusObserver(Config(), registry)
    federation(grid, config, tmp_path / "run", observer=observer)
    (row,) = [row for row in client_rows(tmp_path / "run", 1) if row["client_id"] == victim]
    counts = {
        sample.labels["cause"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "flexlora_client_failures_total" and sample.value
    }
    return row, read_live(tmp_path / "run"), counts, victim


@pytest.mark.parametrize(
    ("tamper", "outcome"),
    [
        (lost, Outcome.LOST),
        (crashed, Outcome.FAILED),
        (unreadable, Outcome.FAILED),
        (claiming, Outcome.REFUSED),
        (without_memory, Outcome.OUT_OF_MEMORY),
    ],
)
def test_the_table_the_live_file_and_the_metrics_agree(tamper, outcome, tmp_path):
    row, live, counts, victim = observed(tamper, tmp_path)
    assert row["status"] == outcome.status and row["cause"]
    assert counts == {outcome.value: 1.0}
    assert (live.heard, live.failed) == (4, 1) and victim not in live.replied
    (failure,) = live.failures
    assert failure.client_id == victim and row["cause"].startswith(failure.cause)


@pytest.mark.parametrize("cause", ["personal factors: no room", "skipped: too hot", "late: was I"])
def test_a_failed_client_counts_as_failed_whatever_its_cause_begins_with(cause, tmp_path):
    row, live, counts, victim = observed(failing(cause), tmp_path)
    assert (row["status"], row["cause"]) == ("failed", cause)
    assert (live.heard, live.failed) == (4, 1) and victim not in live.replied
    assert counts == {"failed": 1.0}


def test_a_round_that_is_skipped_is_no_client():
    shown, silent = Told(), {(1, f"client_{k}"): [SILENT] for k in range(3)}
    config = settings(num_server_rounds=1, server__resends=0, server__quorum=2)
    faulty_run(FaultyGrid(people(3), silent), config, observer=shown)
    assert {args[0] for args in shown.of("replied")} == {f"client_{k}" for k in range(3)}
    ((server_round, cause),) = shown.of("round_skipped")
    assert server_round == 1 and cause.startswith("skipped: 0 updates came, server.quorum is 2")


def test_a_reply_of_an_earlier_round_is_marked_and_counts():
    shown = Told()
    fates = {(1, "client_1"): [Fate(seconds=105.0)], (2, "client_0"): [Fate(seconds=20.0)]}
    config = settings(num_server_rounds=2, server__late_rounds=1, server__resends=0)
    faulty_run(FaultyGrid(people(3), fates), config, observer=shown)
    first, *second = [tuple(args[1:]) for args in shown.of("replied") if args[0] == "client_1"]
    assert first == (Outcome.SILENT, "no reply within 100 s", False)
    assert sorted(second, key=lambda args: args[2]) == [
        (Outcome.OK, "", False),
        (Outcome.OK, "late: trained from round 0", True),
    ]
