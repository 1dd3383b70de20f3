"""``reproduce private-methods``: which runs stand behind each cell; nothing is trained here."""

import json

import pytest

from flexlora.privacy.accounting import Mechanism, epsilon_of
from flexlora.server.settings import check_config
from flexlora.simulations.experiments import variant_runs, variant_table
from flexlora.simulations.experiments.private_methods import (
    BUDGETS,
    DELTA,
    METHODS,
    POPULATIONS,
    TRIED_AT,
)
from flexlora.simulations.experiments.reproduce import reproduce


@pytest.fixture
def seen(monkeypatch):
    configs = {}

    def record(config, out):
        configs[out.name] = config
        return {"loss": 0.25 + len(configs)}

    monkeypatch.setattr(variant_table, "RUNNERS", dict.fromkeys(variant_runs.RUNNERS, record))
    return configs


def test_each_cell_is_a_run_of_its_method_population_and_budget(seen, tmp_path, capsys):
    assert reproduce("private-methods", out=tmp_path, scale=0.4, seeds=1) == 0
    assert len(seen) == len(METHODS) * (1 + len(POPULATIONS) * len(BUDGETS))
    cells, spent = set(), {}
    for config in seen.values():
        check_config(config)
        assert config.sampling.policy == "poisson" and config.ranks.tiers == "2,8,16"
        privacy, epsilon = config.privacy, 0.0
        if privacy.mode == "central":
            once = Mechanism(
                num_clients=max(POPULATIONS),
                sample_share=config.fraction_train,
                noise_multiplier=privacy.noise_multiplier,
            )
            if once not in spent:
                spent[once] = epsilon_of([(once, config.num_server_rounds)], DELTA)
            epsilon = next(b for b in BUDGETS if 0.99 * b < spent[once] <= b)
            assert privacy.clip_quantile == 0.5 and privacy.delta == DELTA
        cells.add((config.method.name, privacy.as_if_clients, epsilon))
    wanted = {(n, budget) for n in POPULATIONS for budget in BUDGETS} | {(0, 0.0)}
    assert cells == {(method, *row) for method in METHODS for row in wanted}
    said = capsys.readouterr().out
    assert all(method in said for method in METHODS) and "10,000" in said
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == len(seen)


def test_every_method_tries_the_same_rates_and_clips_at_one_setting(monkeypatch, seen, tmp_path):
    """The trial of the lowest loss is the one of all rows of its method."""
    tried = []

    def trial(config, out, **options):
        tried.append(config)
        out.mkdir(parents=True)
        loss = abs(config.train.learning_rate - 0.005) + config.privacy.clip
        (out / "metrics.jsonl").write_text(json.dumps({"round": 1, "eval_loss": loss}) + "\n")

    monkeypatch.setattr(variant_table, "simulate", trial)
    assert reproduce("private-methods", out=tmp_path, seeds=1) == 0
    by_method = [
        {(c.train.learning_rate, c.privacy.clip) for c in tried if c.method.name == method}
        for method in METHODS
    ]
    assert by_method[0] == by_method[1] == by_method[2] and len(tried) == 3 * len(by_method[0])
    assert {c.privacy.as_if_clients for c in tried} == {TRIED_AT[0]}
    for config in seen.values():
        assert config.train.learning_rate == 0.005
        assert config.privacy.clip == (
            min(c for _, c in by_method[0]) if config.privacy.clip else 0
        )
