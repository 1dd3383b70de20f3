"""``flexlora reproduce``: every arm is a real run, its numbers are kept, and none is run twice."""

import json

import pytest
from flexlora.simulations import experiments
from flexlora.simulations.experiments import EXPERIMENTS, Arm, reproduce

from flexlora.cli import main
from flexlora.config import Config, resolved
from flexlora.errors import UserError

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
    arms = (
        Arm(title="the base", kind="base"),
        Arm(title="alone", kind="alone"),
        Arm(title="residual", changes={"method.name": "residual"}),
    )
    monkeypatch.setitem(EXPERIMENTS, "small", arms)
    return "small"


def test_every_arm_is_scored_on_the_same_rows_and_kept(small_experiment, tmp_path, capsys):
    assert reproduce(small_experiment, seeds=1, out=tmp_path, sets=SMALL) == 0
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [row["arm"] for row in kept["rows"]] == ["the base", "alone", "residual"]
    base, alone, residual = kept["rows"]
    first = json.loads((tmp_path / "runs/residual-0/metrics.jsonl").read_text().splitlines()[0])
    assert base["all clients"] == pytest.approx(first["eval_exact_match"])
    scores = {"arm", "seed", "rank_2", "rank_4", "all clients"}
    assert set(alone) == scores and set(residual) == {*scores, "loss", "MB down", "MB up"}
    *_, last, said = capsys.readouterr().out.splitlines()
    assert last.startswith("residual") and str(tmp_path / "results.json") in said


def test_arms_that_are_done_are_not_run_again(small_experiment, tmp_path, monkeypatch):
    reproduce(small_experiment, seeds=1, out=tmp_path, sets=SMALL)
    before = (tmp_path / "results.json").read_bytes()

    def refuse(config, out):
        raise AssertionError("an arm was run twice")

    monkeypatch.setattr(experiments, "_RUNNERS", dict.fromkeys(experiments._RUNNERS, refuse))
    reproduce(small_experiment, seeds=1, out=tmp_path, sets=SMALL)
    assert (tmp_path / "results.json").read_bytes() == before
    with pytest.raises(AssertionError, match="run twice"):
        reproduce(small_experiment, seeds=2, out=tmp_path, sets=SMALL)


def test_a_client_alone_trains_on_its_own_rows_only(small_experiment, tmp_path, monkeypatch):
    """As many steps as all rounds together, and never another client's examples."""
    seen = {}
    train = experiments.Worker.train

    def spy(self, jobs):
        results = train(self, jobs)
        seen.update({r.client_id: (r.steps, r.num_examples) for r in results})
        return results

    monkeypatch.setattr(experiments.Worker, "train", spy)
    config = resolved(Config.resolve(sets=(*SMALL, "num-server-rounds=3", "method.name=residual")))
    experiments._alone(config, tmp_path)
    worker = experiments.worker_for(config)
    assert seen == {k: (6, len(worker.data.examples(k, "train"))) for k in worker.client_ids}


def test_unknown_experiments_and_no_seeds_are_told_in_one_sentence(capsys):
    assert main(["reproduce", "first-lok"]) == 2
    known = ", ".join(experiments.EXPERIMENTS)
    assert f"expected {known}. Did you mean 'first-look'?" in capsys.readouterr().err
    assert main(["reproduce", "first-look", "--seeds", "0"]) == 2
    assert "--seeds is 0, expected at least 1" in capsys.readouterr().err


def test_the_rank_table_learns_a_family_at_every_rank(monkeypatch, tmp_path, capsys):
    """A few steps at small sizes: the base's score, six ranks, the rate that validation chose."""
    from flexlora.simulations import rank_table

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
    with pytest.raises(UserError, match=r"method.name is set by the experiment"):
        reproduce(small_experiment, seeds=1, out=tmp_path, sets=("method.name=fedit",))
    (tmp_path / "results.json").write_text("{half")
    with pytest.raises(UserError, match="is damaged"):
        reproduce(small_experiment, seeds=1, out=tmp_path, sets=SMALL)
