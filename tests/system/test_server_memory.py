"""A round's memory does not grow with its replies, and would be seen if it did.

Each federation is a process of its own: replies of 2.2 MB over modules so small that the sums are
dense from two replies on, with four at most beside them, which is what any model's sums come to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from federation import ONE_THREAD
from flexlora.simulations.benchmarks.server_memory import ServerMemoryRow
from flexlora.simulations.benchmarks.server_memory_answers import ServerCase
from flexlora.simulations.benchmarks.server_memory_case import PulledGrid, run_ours
from packed import trained

FEW, MANY = 6, 24
SHAPE = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
HONEST = ["-m", "flexlora.simulations.benchmarks.server_memory_case"]
KEEPING = """
import json, sys
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.benchmarks.server_memory_answers import ServerCase
from flexlora.simulations.benchmarks.server_memory_case import PulledGrid, measure

class Keeping(FlexLoRAStrategy):
    kept = []

    def aggregate_train(self, server_round, replies):
        def noted():
            for reply in replies:
                self.kept.append(reply)
                yield reply

        return super().aggregate_train(server_round, noted())

case = ServerCase.from_json(sys.argv[1])
print(json.dumps(measure(case, PulledGrid(case), Keeping)))
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    config = tmp_path_factory.mktemp("model") / "config.json"
    config.write_text(json.dumps(SHAPE))
    return ServerCase(way="residual", replies=FEW, model=str(config), rank=128, server_max_rank=64)


@pytest.fixture(scope="module")
def found(case):
    """What fresh processes, side by side, say of their peaks."""
    many = replace(case, replies=MANY)
    asked = {
        "few": (HONEST, case),
        "many": (HONEST, many),
        "reversed": (HONEST, replace(many, reversed=True)),
        "kept": (["-c", KEEPING], many),
    }
    started = {
        name: subprocess.Popen(
            [sys.executable, *words, one.to_json()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD, "MALLOC_MMAP_THRESHOLD_": "65536"},
        )
        for name, (words, one) in asked.items()
    }
    try:
        observed = {name: process.communicate(timeout=600) for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    for name, process in started.items():
        assert process.returncode == 0, observed[name][1][-3000:]
    return {name: json.loads(out) for name, (out, _) in observed.items()}


@pytest.mark.slow
def test_the_peak_of_a_round_is_that_of_its_sums_not_of_its_replies(found):
    size = found["few"]["reply_bytes"]
    assert size > 2e6 and found["few"]["peak"] > 2 * size
    # What the allocator keeps for itself differs by a few replies.
    assert found["many"]["peak"] - found["few"]["peak"] < 0.5 * (MANY - FEW) * size


@pytest.mark.slow
def test_in_the_worst_order_no_more_wait_than_there_are(found):
    """They wait in memory up to 256 MB, and these are fewer."""
    size = found["few"]["reply_bytes"]
    assert found["reversed"]["peak"] - found["few"]["peak"] < 1.5 * MANY * size


@pytest.mark.slow
def test_a_strategy_that_keeps_its_replies_is_found_out(found):
    """The negative control: most of what was kept is seen."""
    grown = found["kept"]["peak"] - found["few"]["peak"]
    assert grown > 0.75 * (MANY - FEW) * found["few"]["reply_bytes"]


class Watched(PulledGrid):
    """Notes who trained, in the order in which the replies were handed over; may damage one."""

    def __init__(self, case, damaged=()):
        super().__init__(case)
        self.damaged, self.came = damaged, []

    def pull_messages(self, message_ids):
        for reply in super().pull_messages(message_ids):
            if trained(reply.content):
                self.came.append(reply.content["report"]["client-id"])
                if self.came[-1] in self.damaged:
                    reply.content["report"]["num-examples"] = 0
            yield reply


@pytest.mark.parametrize("reversed_order", [False, True])
def test_replies_come_in_the_order_of_the_case(case, reversed_order):
    small = replace(case, rank=2, replies=3, reversed=reversed_order)
    grid = Watched(small)
    assert len(run_ours(small, grid)) == 1
    assert grid.came == sorted(grid.came, reverse=reversed_order) and len(grid.came) == 3


def test_a_case_whose_replies_do_not_all_count_is_no_measurement(case):
    small = replace(case, rank=2, replies=3)
    with pytest.raises(RuntimeError, match="not every reply counted, expected 3 a round"):
        run_ours(small, Watched(small, damaged=["site_0001"]))


def test_a_row_is_met_at_its_target_and_not_above():
    row = ServerMemoryRow(
        name="x",
        ratio=1.1,
        target=1.1,
        error=0.0,
        replies=(8, 32),
        megabytes=(100.0, 110.0),
        round_seconds=(1.0, 4.0),
        reply_megabytes=40.0,
    )
    assert row.met and row.megabytes_a_second == 320.0
    assert not replace(row, ratio=1.11).met and not replace(row, error=1.0).met
