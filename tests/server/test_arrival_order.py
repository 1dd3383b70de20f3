"""Over-selection: of replies that come at the same time, chance takes the first, not the ids."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from faulty_grid import Fate, FaultyGrid, people, run, settings
from federation import StopAt, Stopped, adapter_bytes, client_rows, small
from flexlora.simulations.simulate import resume, simulate

CLIENTS, ROUNDS = 8, 200
HALF = {"fraction_train": 0.25, "server__over_selection": 1.0}  # 4 are asked, 2 are needed


def shares(fates=None, **changes):
    """How many of the rounds in which it was asked each client counts in."""
    rows, asked, counted = [], Counter(), Counter()
    config = settings(num_server_rounds=ROUNDS, server__late_rounds=0, **changes)
    run(FaultyGrid(people(CLIENTS), fates), config, rows=rows)
    for row in rows:
        asked[row["client_id"]] += 1
        counted[row["client_id"]] += row["status"] == "ok"
    return {name: counted[name] / asked[name] for name in sorted(asked)}, asked


def test_everybody_counts_alike_whatever_its_id():
    share, asked = shares(**HALF)
    assert len(share) == CLIENTS
    for name, own in share.items():
        assert abs(own - 0.5) < 4 * math.sqrt(0.25 / asked[name]), share


def test_who_comes_earlier_still_comes_first():
    """The control: chance is for ties alone."""
    slow = {
        (server_round, "client_0"): [Fate(seconds=3.0)] for server_round in range(1, ROUNDS + 1)
    }
    share, _ = shares(slow, **HALF)
    assert share.pop("client_0") == 0.0 and min(share.values()) > 0.4


def test_where_all_are_needed_all_count():
    share, _ = shares(fraction_train=0.25)
    assert set(share.values()) == {1.0}


def counted(folder):
    return [
        (row["round"], row["client_id"]) for row in client_rows(folder) if row["status"] == "ok"
    ]


@pytest.mark.parametrize("world", [{}, {"population__dropout": 1e-9}], ids=["no clock", "a clock"])
def test_who_counts_is_the_same_for_every_plan_and_after_a_resume(world, tmp_path):
    config = small(
        clients__count=CLIENTS,
        num_server_rounds=4,
        train__max_steps=1,
        lora__target_modules="q_proj",
        eval__every=0,
        **HALF,
        **world,
    )
    plans = {str(size): config.with_values({"engine.cohort-size": size}) for size in (1, 4)}
    for name, plan in plans.items():
        simulate(plan, tmp_path / name)
    assert counted(tmp_path / "1") == counted(tmp_path / "4")
    asked = {
        r: sorted(row["client_id"] for row in client_rows(tmp_path / "4", r)) for r in range(1, 5)
    }
    first_two = [(str(r), name) for r, names in asked.items() for name in names[:2]]
    assert counted(tmp_path / "4") != first_two, "this is the order of the ids"
    with pytest.raises(Stopped):
        simulate(plans["4"], tmp_path / "halved", observer=StopAt("replied", 3, Stopped))
    resume(tmp_path / "halved")
    assert counted(tmp_path / "halved") == counted(tmp_path / "4")
    assert adapter_bytes(tmp_path / "halved") == adapter_bytes(tmp_path / "4")
