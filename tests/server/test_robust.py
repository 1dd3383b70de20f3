"""``robust.rule`` in the server: what is refused, who is left out, which round changes G."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import MessageType

from faulty_grid import FaultyGrid, lost, people, run, settings
from flexlora.errors import UserError
from flexlora.server.robustness import robust_mean
from flexlora.server.settings import check_config
from one_round import SHAPES, distance, same_bits
from packed import tampered

CLIENTS, EVIL = 8, ("client_0", "client_5")


def robust(rule="multi-krum", **changes):
    return settings(robust__rule=rule, server__late_rounds=0, **changes)


class HostileGrid(FaultyGrid):
    """Two clients send their ``lora_B`` 20 times as large, which the bound on norms lets pass."""

    def answer(self, message):
        reply = super().answer(message)
        client_id = self.clients[message.metadata.dst_node_id]
        if client_id in EVIL and message.metadata.message_type == MessageType.TRAIN:
            with tampered(reply.content) as (arrays, _):
                for key, array in arrays.items():
                    factor = 20.0 if key.endswith("lora_B") else 1.0
                    values = factor * np.frombuffer(array.data, dtype=np.float64)
                    arrays[key] = replace(array, data=values.tobytes())
        return reply


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"robust__rule": "none", "robust__hostile_share": 0.3}, "0.3 with robust.rule=none"),
        ({"robust__hostile_share": 0.5}, "expected below 0.5: where hostile clients are the major"),
        ({"robust__hostile_share": 1.0}, "robust.hostile-share is 1, expected below 0.5"),
        ({"method__name": "fedit"}, "method.name=fedit, which averages factors"),
        ({"method__name": "raflora"}, "method.name=raflora, which averages factors or bands"),
        ({"method__name": "fedex-lora"}, "method.name=fedex-lora, which averages factors"),
        ({"sampling__policy": "utility"}, "sampling.policy is utility with robust.rule=multi-krum"),
        ({"sampling__policy": "examples"}, "a client that reports or appears as it likes"),
        ({"server__late_rounds": 1}, "server.late-rounds is 1 with robust.rule=multi-krum"),
        ({"server__over_selection": 0.5}, "the first replies count"),
        (
            {
                "privacy__mode": "central",
                "privacy__clip": 1.0,
                "privacy__noise_multiplier": 1.0,
                "sampling__policy": "poisson",
                "method__server_learning_rate": 1.0,
            },
            "robust.rule is multi-krum with privacy.mode=central: the rule compares single",
        ),
    ],
)
def test_what_a_rule_cannot_protect_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        check_config(
            settings(**{"robust__rule": "multi-krum", "server__late_rounds": 0, **changes})
        )


@pytest.mark.parametrize(
    "method", ["carried", "flexlora", "aligned", "basis", "ffa-lora", "florist"]
)
def test_methods_that_add_products_are_accepted(method):
    check_config(robust(method__name=method))


def test_an_unknown_rule_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match=r"robust.rule is 'multikrum'.*Did you mean 'multi-krum'"):
        robust("multikrum")


def test_the_hostile_ones_are_counted_among_those_asked():
    config = robust(robust__hostile_share=0.2)
    counts = {n: robust_mean(config, n).hostile for n in (0, 1, 5, 6, 10, 11, 15)}
    assert counts == {0: 0, 1: 1, 5: 1, 6: 2, 10: 2, 11: 3, 15: 3}
    assert robust_mean(settings(), 10) is None


def test_too_few_clients_for_the_assumed_share_are_refused_before_the_first_round():
    with pytest.raises(
        UserError, match="needs 5 updates where 1 may be hostile, and a round asks 4"
    ):
        run(FaultyGrid(people(4)), robust())
    with pytest.raises(UserError, match="a round asks 1 of 1 clients; raise fraction-train"):
        run(FaultyGrid(people(1)), robust("geometric-median"))


def test_the_updates_that_krum_leaves_out_are_named_and_the_sum_is_the_others():
    """All others alike, whatever examples they report."""
    rows: list = []
    grid = HostileGrid(people(CLIENTS))
    config = robust(num_server_rounds=1, method__server_learning_rate=1.0)
    strategy = run(grid, config, rows=rows)
    evil = [row for row in rows if row["client_id"] in EVIL]
    assert len(evil) == 2 and {row["status"] for row in evil} == {"ok"}
    assert all(row["discount"] == 0.0 for row in evil)
    assert {row["cause"] for row in evil} == {"multi-krum left it out"}
    others = [row for row in rows if row["client_id"] not in EVIL]
    assert {row["cause"] for row in others} == {"multi-krum: it counts 1.33 times"}
    honest = [result for (_, name), result in grid.results.items() if name not in EVIL]
    dense = {n: sum(r.adapter[n].delta_weight() for r in honest) / len(honest) for n in SHAPES}
    assert len({result.num_examples for result in honest}) > 1
    assert distance(strategy.state.change, dense) < 1e-9


def test_without_a_rule_the_same_attack_moves_the_sum():
    config = settings(server__late_rounds=0)
    without = {(r, client_id): [lost(5)] * 9 for r in (1, 2) for client_id in EVIL}
    attacked = run(HostileGrid(people(CLIENTS)), config)
    honest = run(FaultyGrid(people(CLIENTS), without), config)
    assert distance(attacked.state.change, honest.state.change) > 1.0


def test_replies_may_come_in_any_order():
    late = {(1, "client_2"): [replace(lost(0), seconds=30.0)]}
    first = run(HostileGrid(people(CLIENTS)), robust("nearest-trimmed-mean"))
    second = run(HostileGrid(people(CLIENTS), late), robust("nearest-trimmed-mean"))
    assert same_bits(first.state, second.state)


def test_a_round_with_too_few_updates_changes_nothing_and_says_so():
    silent = {(1, f"client_{k}"): [lost(5)] * 9 for k in (1, 2)}
    rows: list = []
    config = robust(num_server_rounds=1, server__skipped_rounds=0)
    strategy = run(FaultyGrid(people(CLIENTS), silent), config, rows=rows)
    assert all(float(svd.S.sum()) == 0.0 for svd in strategy.state.change.values())
    assert "6 updates came, robust.rule=multi-krum needs 7" in strategy.metrics.skipped
