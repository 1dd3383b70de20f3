"""A failure that its node says will pass is a lost message (others: ``test_resending.py``)."""

from __future__ import annotations

import pytest
from flwr.app import Message, RecordDict

from faulty_grid import Fate, FaultyGrid, people, run, settings
from flexlora.clients.failure_reply import failure_reply
from flexlora.server.transport.messages import transient_cause


def test_a_failure_that_does_not_pass_is_the_cause_and_backs_the_client_off():
    fates = {"client_1": [Fate(passing=f"the trainer is away ({k})") for k in range(9)]}
    grid = FaultyGrid(people(2), {(1, k): v for k, v in fates.items()})
    found = []
    strategy = run(grid, settings(num_server_rounds=1), rows=found)
    rows = {row["client_id"]: row for row in found}
    assert len(grid.copies(1, "client_1")) == 3 and rows["client_0"]["status"] == "ok"
    row = rows["client_1"]
    assert row["status"] == "failed" and row["cause"].startswith("the trainer is away (2)")
    assert strategy.selector.history.lost == {"client_1": (1, 1)}


@pytest.mark.parametrize("flag", [1, "true", [True], b"1"])
def test_only_the_flag_itself_has_a_message_sent_again(flag):
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    content = failure_reply("train", "client_1", "broken")
    content["report"]["transient"] = flag
    assert transient_cause(Message(content, reply_to=message)) == ""
    content["report"].update({"transient": True, "cause": "a\nb" + "c" * 999})
    assert transient_cause(Message(content, reply_to=message)) == "a b" + "c" * 297
