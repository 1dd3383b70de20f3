"""Runs whose clients add their own noise: epsilon in the metrics, budgets, resumes, no losses."""

from __future__ import annotations

import csv
import json
import math

import pytest

from federation import small
from flexlora.clients.worker import Worker
from flexlora.privacy.client_rounds import client_epsilon, client_round
from flexlora.simulations.simulate import resume, simulate
from spelled import of_names

COMMON = {"privacy__clip": 1.0, "privacy__noise_multiplier": 6.0, "privacy__reproducible": True}
LOCAL = {"privacy__mode": "local", "method__name": "basis", **COMMON}
EXAMPLE = {"privacy__mode": "example", "method__name": "carried", **COMMON}


def config(base, **changes):
    return small(**{"num_server_rounds": 2, "fraction_train": 0.5, **base, **changes})


def rows_of(folder):
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with (folder / "clients.csv").open() as file:
        return metrics, list(csv.DictReader(file))


def expected(chosen, clients, num_examples):
    """Epsilon by client after each round, from who trained in it."""
    by_round, spent = [], {}
    for at in range(1, chosen.num_server_rounds + 1):
        for row in clients:
            if int(row["round"]) == at and row["status"] == "ok":
                spent[row["client_id"]] = spent.get(row["client_id"], 0) + 1
        values = []
        for client_id, rounds in spent.items():
            mechanism, count = client_round(chosen, num_examples[client_id])
            values.append(client_epsilon([(mechanism, rounds * count)], 1e-5))
        by_round.append(sorted(values))
    return by_round


@pytest.mark.parametrize("base", [LOCAL, EXAMPLE], ids=["local", "example"])
def test_metrics_have_the_largest_and_the_median_epsilon_and_no_loss(base, tmp_path):
    chosen = config(base)
    simulate(chosen, tmp_path / "run")
    metrics, clients = rows_of(tmp_path / "run")
    data = Worker(chosen).data
    counts = {client_id: data.count(client_id, "train").examples for client_id in data.client_ids}
    for row, values in zip(metrics[1:], expected(chosen, clients, counts), strict=True):
        assert row["epsilon"] == pytest.approx(values[-1], rel=1e-9)
        middle = values[(len(values) - 1) // 2], values[len(values) // 2]
        assert row["epsilon_median"] == pytest.approx(sum(middle) / 2, rel=1e-9)
        assert math.isnan(row["train_loss"] or math.nan) and row["eval_loss"] > 0
    assert "epsilon" not in metrics[0]
    for row in clients:
        assert (row["loss_before"], row["loss_after"]) == ("", "")
        assert row["status"] == "ok" and int(row["num_examples"]) == counts[row["client_id"]]


def test_clients_refuse_what_would_exceed_the_budget_and_remember_after_a_resume(tmp_path):
    whole = config(LOCAL, num_server_rounds=4, fraction_train=1.0, eval__every=0)
    mechanism, _ = client_round(whole, 1)
    after = [client_epsilon([(mechanism, count)], 1e-5) for count in range(4)]
    budget = of_names(privacy__epsilon=(after[2] + after[3]) / 2)
    simulate(whole.with_values(budget), tmp_path / "whole")
    metrics, clients = rows_of(tmp_path / "whole")
    assert metrics[-1]["epsilon"] == pytest.approx(after[2], rel=1e-9)
    for row in clients:
        refused = int(row["round"]) > 2
        assert row["status"] == ("failed" if refused else "ok")
        assert not refused or f"and of this client epsilon {after[2]:.4g} is spent" in row["cause"]
    parts = whole.with_values({**budget, "num-server-rounds": 1})
    simulate(parts, tmp_path / "parts")
    file = tmp_path / "parts" / "config.toml"
    file.write_text(file.read_text().replace("num-server-rounds = 1", "num-server-rounds = 4"))
    resume(tmp_path / "parts")
    again, others = rows_of(tmp_path / "parts")
    assert [row["status"] for row in others] == [row["status"] for row in clients]
    assert [row.get("epsilon") for row in again] == [row.get("epsilon") for row in metrics]


def test_the_noise_of_a_client_does_not_depend_on_its_cohort(tmp_path):
    """The same run, trained one client at a time."""
    changes = []
    for size in (1, 4):
        chosen = config(EXAMPLE, eval__every=0, engine__cohort_size=size, wire__dtype="float64")
        strategy = simulate(chosen, tmp_path / str(size))
        changes.append(strategy.state.change)
    for name in changes[0]:
        one, other = (change.delta_weight(name) for change in changes)
        assert float((one - other).norm()) <= 1e-5 * float(one.norm())
