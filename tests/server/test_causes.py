"""Causes as kinds: those that a run's own code writes, and every other that it can."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message

from federation import TamperingGrid, client_rows, federation, small
from flexlora.clients.worker import worker_for
from flexlora.runs.live_state import read_live
from flexlora.server.observing.causes import KINDS, failure_kind, of_another_round


def lost(reply, message):
    return [Message(Error(code=5, reason="the node is gone"), reply_to=message)]


def claiming(reply, message):
    reply.content["report"]["num-examples"] = 10**6
    return [reply]


@pytest.mark.parametrize(("tamper", "kind"), [(lost, "lost"), (claiming, "refused")])
def test_kinds_are_those_of_real_failures(tamper, kind, tmp_path):
    """The cause that a run's own code writes down is of the kind that its status says."""
    config = small()
    worker = worker_for(config)
    victim = sorted(worker.client_ids)[1]
    grid = TamperingGrid(worker, tamper=tamper, victims=[victim])
    federation(grid, config, tmp_path / "run")
    (row,) = [row for row in client_rows(tmp_path / "run", 1) if row["status"] != "ok"]
    assert row["client_id"] == victim and failure_kind(row["cause"]) == kind
    live = read_live(tmp_path / "run")
    assert (live.heard, live.failed) == (4, 1)
    (failure,) = live.failures
    assert failure.client_id == victim and row["cause"].startswith(failure.cause)


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        ("", ""),
        ("late: trained from round 3", ""),
        ("late: trained from round 3; out of memory with 8 rows in a pass: trained with 2", ""),
        ("personal factors: out of memory at rank 4 with 1 row in a pass", ""),
        ("late: trained from round 3; client 7: trained lora_A as round 4 asked", "refused"),
        ("client 7, module 'q': lora_B holds NaN or infinity.", "refused"),
        ("unreadable reply: 'update.values'", "refused"),
        ("no reply within 600 s", "silent"),
        ("Flower error 8: the process ended", "lost"),
        ("Flower error 2: it raised", "failed"),
        ("Flower error 58: what is this", "failed"),
        ("out of memory at rank 8 with 1 row in a pass; asks for rank 4", "out of memory"),
        ("skipped: 1 updates came, server.quorum is 2", "round skipped"),
        ("evaluation: no rows", "evaluation"),
        ("ValueError: something else", "failed"),
    ],
)
def test_a_cause_is_of_one_of_a_few_kinds(cause, kind):
    assert failure_kind(cause) == kind
    assert kind in ("", *KINDS)
    assert of_another_round(cause) == cause.startswith("late")
