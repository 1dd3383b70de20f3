"""``reproduce rates`` and ``scaling``: settings, the runs behind their rows, the printed tables."""

import io

import pytest
from rich.console import Console

from flexlora.config.resolve import Config
from flexlora.simulations.experiments.scaling import PLAIN, RSLORA, SCALING
from flexlora.simulations.experiments.server_rates import (
    RATES,
    SETTINGS,
    course_table,
    rate_variants,
)
from flexlora.simulations.experiments.variant_runs import RUNNERS

TINY = {
    "train.max-steps": 2,
    "train.per-device-train-batch-size": 2,
    "eval.max-examples": 1,
    "eval.generate": "never",
    "engine.threads": 1,
}


def test_every_setting_is_run_at_every_rate_and_differs_in_nothing_else():
    variants = rate_variants()
    assert len(variants) == len(SETTINGS) * len(RATES)
    for title in SETTINGS:
        of_setting = [dict(variant.changes) for variant in variants if variant.part == title]
        rates = [changes.pop("method.server-learning-rate") for changes in of_setting]
        assert sorted(rates) == sorted(RATES.values())
        assert all(changes == of_setting[0] for changes in of_setting)
        Config.of(of_setting[0])
    rounds = {v.part: v.changes["num-server-rounds"] for v in rate_variants(0.25)}
    assert set(rounds.values()) == {2}


def test_the_table_has_the_mean_over_seeds_by_round_and_the_rule_s_rates():
    part = "1 client, IID"
    rows = [
        {
            "variant": f"{rate}, {part}",
            "seed": seed,
            "rounds": [{"round": r, "loss": 1.0 / r + seed, "rate": eta + r} for r in (1, 2)],
        }
        for rate, eta in (("rate 1", 1.0), ("the round's own", 2.0))
        for seed in (0, 1)
    ]
    file = io.StringIO()
    Console(file=file, width=100).print(course_table(part, rate_variants(), rows))
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert lines[2] == ["rate", "1", "1.500", "1.000"]
    assert lines[3] == ["rate", "2"]
    assert lines[5] == ["which", "was", "3.0", "4.0"]


def test_a_run_reports_its_rates_1_for_one_client_and_more_where_clients_differ(tmp_path):
    """The default of before took rate 2 whatever the federation."""
    changes = {**TINY, "num-server-rounds": 2, "fraction-train": 1.0, "data.partition": "iid"}
    rates = {}
    for count in (1, 4):
        config = Config.of({**changes, "clients.count": count})
        scores = RUNNERS["course"](config, tmp_path / str(count))
        rates[count] = [entry["rate"] for entry in scores["rounds"]]
        assert scores["loss"] == scores["rounds"][-1]["loss"]
    assert rates[1] == [1.0, 1.0]
    assert all(1.0 < rate <= 2.0 for rate in rates[4])


def test_with_alpha_over_rank_a_weak_client_moves_the_sum_further(tmp_path):
    """What ``scaling`` measures, after two steps instead of twenty."""
    norms = {}
    for variant in SCALING:
        if variant.kind == "norm" and variant.changes["ranks.fixed"] in (2, 16):
            config = Config.of({**TINY, "eval.every": 0, **variant.changes})
            norms[variant.title] = RUNNERS["norm"](config, tmp_path / variant.title)["|dW|"]
    plain = norms[f"rank 2, {PLAIN}"] / norms[f"rank 16, {PLAIN}"]
    rslora = norms[f"rank 2, {RSLORA}"] / norms[f"rank 16, {RSLORA}"]
    assert plain > 1.7 and rslora == pytest.approx(plain / 8**0.5, rel=0.2)


def test_both_scalings_are_equal_at_rank_8_and_differ_in_nothing_else():
    rows = [dict(variant.changes) for variant in SCALING if variant.kind == "loss"]
    rslora = [row.pop("lora.rslora", False) for row in rows]
    alphas = [row.pop("lora.alpha") for row in rows]
    assert rslora == [False, True] and rows[0] == rows[1]
    assert alphas[0] / 8 == pytest.approx(alphas[1] / 8**0.5)
