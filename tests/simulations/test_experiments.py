"""``flexlora reproduce``: every variant is a real run, its numbers are kept, none is run twice."""

import json
import math
import statistics
from pathlib import Path

import pytest

from flexlora.commands.cli import main
from flexlora.config.resolve import Config, resolved
from flexlora.errors import UserError
from flexlora.report.console import make_console
from flexlora.simulations.experiments import variant_runs, variant_table
from flexlora.simulations.experiments.reproduce import EXPERIMENTS, Experiment, reproduce, table_of
from flexlora.simulations.experiments.request import Request, scaled
from flexlora.simulations.experiments.variant_table import with_gap_closed
from flexlora.simulations.experiments.variants import Variant

SMALL = (
    "clients.count=4",
    "num-server-rounds=1",
    "train.max-steps=2",
    "train.per-device-train-batch-size=2",
    "eval.max-examples=1",
    "eval.max-new-tokens=4",
    "ranks.tiers=2,4",
    "ranks.shares=equal",
    "engine.threads=1",
)


@pytest.fixture
def small_experiment(monkeypatch):
    variants = (
        Variant(title="the base", kind="base"),
        Variant(title="alone", kind="alone"),
        Variant(title="residual", changes={"method.name": "residual"}),
    )
    small = Experiment(about="small", expected="", minutes=1, run=table_of(variants))
    monkeypatch.setitem(EXPERIMENTS, "small", small)
    return "small"


@pytest.fixture
def recorded(monkeypatch):
    """The configurations that the variants would be run with; nothing is run."""
    seen = []

    def record(config, out):
        seen.append(config)
        return {"all clients": 0.5, "loss": 1.0}

    monkeypatch.setattr(variant_table, "RUNNERS", dict.fromkeys(variant_runs.RUNNERS, record))
    return seen


def request(**values):
    values = {"name": "x", "out": Path("x"), "console": make_console(), "given": {}, **values}
    return Request(**values)


def test_every_variant_is_scored_on_the_same_rows_and_kept(small_experiment, tmp_path, capsys):
    assert reproduce(small_experiment, seeds=1, out=tmp_path, sets=SMALL) == 0
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [row["variant"] for row in kept["rows"]] == ["the base", "alone", "residual"]
    base, alone, residual = kept["rows"]
    first = json.loads((tmp_path / "runs/residual-0/metrics.jsonl").read_text().splitlines()[0])
    assert base["all clients"] == pytest.approx(first["eval_exact_match"])
    scores = {"variant", "seed", "rank_2", "rank_4", "all clients"}
    assert set(alone) == scores and set(residual) == {*scores, "loss", "MB down", "MB up"}
    *_, last, said = capsys.readouterr().out.splitlines()
    assert last.startswith("residual") and str(tmp_path / "results.json") in said


def test_variants_that_are_done_are_not_run_again(small_experiment, tmp_path, monkeypatch):
    reproduce(small_experiment, seeds=1, out=tmp_path, sets=SMALL)
    before = (tmp_path / "results.json").read_bytes()

    def refuse(config, out):
        raise AssertionError("a variant was run twice")

    monkeypatch.setattr(variant_table, "RUNNERS", dict.fromkeys(variant_table.RUNNERS, refuse))
    reproduce(small_experiment, seeds=1, out=tmp_path, sets=SMALL)
    assert (tmp_path / "results.json").read_bytes() == before
    with pytest.raises(AssertionError, match="run twice"):
        reproduce(small_experiment, seeds=2, out=tmp_path, sets=SMALL)


def test_a_client_alone_trains_on_its_own_rows_only(small_experiment, tmp_path, monkeypatch):
    """As many steps as all rounds together, and never another client's examples."""
    seen = {}
    train = variant_runs.Worker.train

    def spy(self, jobs):
        results = train(self, jobs)
        seen.update({r.client_id: (r.steps, r.num_examples) for r in results})
        return results

    monkeypatch.setattr(variant_runs.Worker, "train", spy)
    config = resolved(Config.resolve(sets=(*SMALL, "num-server-rounds=3", "method.name=residual")))
    variant_runs._alone(config, tmp_path)
    worker = variant_runs.worker_for(config)
    assert seen == {k: (6, len(worker.data.examples(k, "train"))) for k in worker.client_ids}


def test_unknown_experiments_and_no_seeds_are_told_in_one_sentence(capsys):
    assert main(["reproduce", "first-lok"]) == 2
    known = ", ".join(EXPERIMENTS)
    assert f"expected {known}. Did you mean 'first-look'?" in capsys.readouterr().err
    assert main(["reproduce", "first-look", "--seeds", "0"]) == 2
    assert "--seeds is 0, expected at least 1" in capsys.readouterr().err


def test_the_rank_table_learns_a_family_at_every_rank(monkeypatch, tmp_path, capsys):
    """A few steps at small sizes: the base's score, six ranks, the rate that validation chose."""
    from flexlora.simulations.benchmarks import rank_table

    monkeypatch.setattr(rank_table, "ROWS", {"train": 40, "validation": 4, "test": 6})
    file = tmp_path / "table.json"
    arguments = ["--tasks", "plural", "--steps", "2", "--rates", "1e-3,5e-3", "--json", str(file)]
    rank_table.main(arguments)
    (row,) = json.loads(file.read_text())
    assert row["name"] == "plural" and row["half"] == "known"
    assert set(row["rates"].values()) <= {1e-3, 5e-3}
    assert all(0 <= row[f"rank_{rank}"] <= 1 for rank in rank_table.RANKS)
    assert "rank_32" in capsys.readouterr().out


def test_kept_numbers_are_never_mixed_with_others(small_experiment, tmp_path):
    reproduce(small_experiment, seeds=1, out=tmp_path, sets=SMALL)
    with pytest.raises(UserError, match="another experiment or other --set"):
        reproduce(small_experiment, seeds=1, out=tmp_path, sets=(*SMALL, "lora.alpha=8"))
    with pytest.raises(UserError, match="or --scale"):
        reproduce(small_experiment, seeds=1, out=tmp_path, sets=SMALL, scale=0.5)
    with pytest.raises(UserError, match=r"method.name is set by the experiment"):
        reproduce(small_experiment, seeds=1, out=tmp_path, sets=("method.name=fedit",))
    (tmp_path / "results.json").write_text("{half")
    with pytest.raises(UserError, match="is damaged"):
        reproduce(small_experiment, seeds=1, out=tmp_path, sets=SMALL)


# --- scale -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, -1.0, 0.001, 11.0, math.nan, math.inf])
def test_a_scale_that_makes_no_sense_is_refused(scale, capsys):
    with pytest.raises(UserError, match=r"--scale is .*, expected a number from 0.01 to 10"):
        request(scale=scale)
    assert main(["reproduce", "first-look", "--scale", str(scale)]) == 2
    assert "--scale is" in capsys.readouterr().err


def test_scale_is_a_factor_on_clients_rounds_and_seeds(small_experiment, tmp_path, recorded):
    """What is given with --set, or with --seeds, is not scaled."""
    sizes = {}
    for scale in (1.0, 0.5, 2.0):
        recorded.clear()
        reproduce(small_experiment, out=tmp_path / str(scale), scale=scale)
        config = recorded[0]
        sizes[scale] = config.clients.count, config.num_server_rounds, len(recorded) // 3
    assert sizes == {1.0: (0, 8, 3), 0.5: (12, 4, 2), 2.0: (48, 16, 6)}
    recorded.clear()
    sets = ("num-server-rounds=5", "clients.count=7")
    reproduce(small_experiment, seeds=1, out=tmp_path / "given", scale=0.1, sets=sets)
    assert {(c.clients.count, c.num_server_rounds) for c in recorded} == {(7, 5)}
    assert len(recorded) == 3


def test_a_small_scale_keeps_a_client_for_every_tier_and_two_rounds(recorded, tmp_path):
    """80/10/10 % of ten clients are 8, 1 and 1; and nobody's own data is made smaller."""
    assert request(scale=0.01).default_sizes() == {"clients.count": 10, "num-server-rounds": 2}
    own = request(scale=0.5, given={"data.path": "somewhere"})
    assert own.default_sizes() == {"num-server-rounds": 4}
    assert [scaled(3, scale) for scale in (0.01, 0.5, 0.6, 2.0)] == [1, 2, 2, 6]
    assert request(scale=0.1, num_seeds=4, first_seed=2).seeds == [2, 3, 4, 5]


def test_trials_are_run_from_half_the_scale_on(monkeypatch, tmp_path, recorded):
    """Below it the middle one is taken, untried; at it the one with the lowest loss."""
    trials = tuple({"train.learning-rate": rate} for rate in (1e-3, 2e-3, 3e-3))
    variants = (Variant(title="tried", changes={"method.name": "residual"}, trials=trials),)
    experiment = Experiment(about="", expected="", minutes=1, run=table_of(variants))
    monkeypatch.setitem(EXPERIMENTS, "tried", experiment)
    tries = []

    def spy(config, out, **_):
        out.mkdir(parents=True)
        loss = abs(config.train.learning_rate - 3e-3)
        row = {"round": config.num_server_rounds, "eval_loss": loss}
        (out / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        tries.append((config.num_server_rounds, config.seed))

    monkeypatch.setattr(variant_table, "simulate", spy)
    reproduce("tried", seeds=1, out=tmp_path / "small", scale=0.4)
    assert not tries and recorded[-1].train.learning_rate == 2e-3
    reproduce("tried", seeds=1, out=tmp_path / "large", scale=0.5)
    assert tries == [(2, 1000)] * 3 and recorded[-1].train.learning_rate == 3e-3


# --- what is listed and printed----------------------------------------------------------------


def test_without_a_name_every_experiment_is_listed_with_its_cost_and_figures(capsys):
    assert main(["reproduce"]) == 0
    out = capsys.readouterr().out
    for name, experiment in EXPERIMENTS.items():
        lines = out.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{name} "))
        assert str(experiment.minutes) in lines[at] and experiment.about in lines[at]
        assert experiment.expected in lines[at + 1]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("rank-colapse", "rank-collapse"),
        ("heavytail", "heavy-tail"),
    ],
)
def test_the_nearest_experiment_is_named(wrong, meant, capsys):
    assert main(["reproduce", wrong]) == 2
    assert f"Did you mean '{meant}'?" in capsys.readouterr().err


def test_the_gap_is_that_of_the_own_part_and_seed():
    variants = [
        Variant(title="weak a", part="a", end="weak"),
        Variant(title="strong a", part="a", end="strong"),
        Variant(title="method a", part="a"),
        Variant(title="weak b", part="b", end="weak"),
        Variant(title="strong b", part="b", end="strong"),
        Variant(title="method b", part="b"),
    ]
    losses = {"weak a": 2.0, "strong a": 1.0, "method a": 1.25}
    losses |= {"weak b": 8.0, "strong b": 4.0, "method b": 9.0}
    rows = [{"variant": k, "seed": s, "loss": v + s} for k, v in losses.items() for s in (0, 1)]
    rows += [
        {"variant": "method a", "seed": 2, "loss": 1.0},
        {"variant": "weak b", "seed": 2, "loss": 99},
    ]
    closed = {
        (r["variant"], r["seed"]): r.get("gap closed") for r in with_gap_closed(variants, rows)
    }
    assert closed["method a", 0] == closed["method a", 1] == pytest.approx(0.75)
    assert closed["method b", 0] == pytest.approx(-0.25) and closed["method a", 2] is None
    assert closed["weak b", 1] == 0.0 and closed["strong b", 1] == 1.0


def test_the_gap_closed_is_a_ratio_of_means_and_its_deviation_that_of_the_gains():
    ends = [Variant(title=end, end=end) for end in ("weak", "strong")]
    losses = {"weak": (4.0, 4.2, 3.9), "strong": (3.6, 4.0, 3.8), "own": (3.8, 4.0, 4.0)}
    rows = [
        {"variant": k, "seed": s, "loss": v} for k, own in losses.items() for s, v in enumerate(own)
    ]
    closed = with_gap_closed([*ends, Variant(title="own")], rows)
    values = [row["gap closed"] for row in closed if row["variant"] == "own"]
    mean = {title: statistics.fmean(own) for title, own in losses.items()}
    gap = mean["weak"] - mean["strong"]
    assert statistics.fmean(values) == pytest.approx((mean["weak"] - mean["own"]) / gap)
    gains = [weak - own for weak, own in zip(losses["weak"], losses["own"], strict=True)]
    assert statistics.stdev(values) == pytest.approx(statistics.stdev(gains) / gap)
    level = [{**row, "loss": 1.0} for row in rows]
    assert all(
        "gap closed" not in row for row in with_gap_closed([*ends, Variant(title="own")], level)
    )
