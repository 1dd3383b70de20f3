"""The federation of 1,613: its sizes, its count of everybody, a broken run that goes on."""

import copy
import json

import pytest

from flexlora.commands.cli import main
from flexlora.config.resolve import resolved
from flexlora.report.console import make_console
from flexlora.runs.folder import RunFolder
from flexlora.simulations.experiments import flexlora_1613 as module
from flexlora.simulations.experiments.flexlora_1613 import Witness, checks_of, config_of
from flexlora.simulations.experiments.request import Request

NAME = "flexlora-1613"
ROWS = {"train": 3, "validation": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve clients that add a word; one of them holds no train rows."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in ROWS.items():
        lines = []
        for client in range(12):
            own = 0 if (client, split) == (5, "train") else count
            row = {"client": f"{client:04d}", "instruction": f"Say {client}.", "output": "yes"}
            lines += [json.dumps({**row, "input": f"number {k}"}) for k in range(own)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arguments(folder, out, *sets):
    words = ["reproduce", NAME, "--scale", "0.05", "--seeds", "1", "--out", str(out)]
    sets = (
        f"data.path={folder}",
        "clients.count=12",
        "train.max-steps=1",
        "train.per-device-train-batch-size=2",
        "engine.threads=1",
        "eval.every=1",
        *sets,
    )
    return words + [word for item in sets for word in ("--set", item)]


def request(out, **values):
    values = {"given": {"data.path": "somewhere"}, **values}
    return Request(name=NAME, out=out, console=make_console(), **values)


def test_without_data_it_says_what_to_give(capsys):
    assert main(["reproduce", NAME]) == 2
    error = capsys.readouterr().err
    assert "got no data folder" in error and "--set data.path=DIR" in error
    assert main(["reproduce", NAME, "--set", "data.path=x", "--set", "seed=3"]) == 2
    assert "seed is set by the experiment" in capsys.readouterr().err
    assert main(["reproduce", NAME, "--set", "data.path=/not/there"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_scale_1_is_the_scenario_with_80_clients_a_round(tmp_path):
    config = config_of(request(tmp_path), 3)
    assert (config.clients.count, config.min_train_clients, config.seed) == (0, 80, 3)
    assert config.ranks.policy == "paper:heavy-tail-light"
    assert config.fraction_train == 0.05 and config.train.per_device_train_batch_size == 4
    small = config_of(request(tmp_path, scale=0.1), 0)
    assert (small.clients.count, small.min_train_clients) == (161, 8)
    assert small.num_server_rounds == max(2, round(config.num_server_rounds / 10))
    given = {"data.path": "somewhere", "num-server-rounds": 7, "min-train-clients": 2}
    own = config_of(request(tmp_path, scale=0.1, given=given), 0)
    assert (own.num_server_rounds, own.min_train_clients) == (7, 2)


def test_everybody_is_known_and_counted(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path, "num-server-rounds=5")) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["clients"], row["left out"], row["without train rows"]) == (11, 1, 1)
    assert row["clients a round"] == [4] * 5 and row["rounds"] == 5
    assert row["left out in clients.csv"] == 1 and len(row["resident bytes"]) == 5
    metrics = RunFolder(tmp_path / "runs/0").metrics()
    assert row["loss of the base"] == metrics[0]["eval_loss"]
    assert row["loss"] == metrics[-1]["eval_loss"]
    out = capsys.readouterr().out
    assert "clients known: expected 12, seen 12: holds." in out
    assert (
        "4 of 4 expected figures hold; 3 expected figures are those of scale 1 and were not judged."
        in out
    )


def test_a_broken_run_goes_on_after_its_last_round_and_a_done_one_is_not_run(
    folder, tmp_path, monkeypatch, capsys
):
    finished = Witness.round_finished

    def power_cut(self, metrics):
        finished(self, metrics)
        if metrics["round"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Witness, "round_finished", power_cut)
    assert main(arguments(folder, tmp_path)) == 130
    assert [row["round"] for row in RunFolder(tmp_path / "runs/0").metrics()] == [0, 1]
    monkeypatch.setattr(Witness, "round_finished", finished)
    simulate = module.simulate
    monkeypatch.setattr(module, "simulate", None)
    assert main(arguments(folder, tmp_path)) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["rounds"] == 2 and len(row["resident bytes"]) == 2
    assert (row["clients"], row["left out"], row["left out in clients.csv"]) == (11, 1, 1)
    monkeypatch.setattr(module, "resume", None)
    assert main(arguments(folder, tmp_path)) == 0
    monkeypatch.setattr(module, "simulate", simulate)
    capsys.readouterr()
    assert main(arguments(folder, tmp_path, "train.learning-rate=0.1")) == 2
    assert "other --set" in capsys.readouterr().err


def test_a_run_of_another_configuration_is_not_gone_on_with(folder, tmp_path):
    config = config_of(request(tmp_path, given={"data.path": str(folder)}), 0)
    run = RunFolder.create(tmp_path / "run", config)
    assert not module._unfinished(run.path, config)  # nothing to go on from
    (run.path / "checkpoint").mkdir()
    (run.path / "checkpoint/current.json").write_text("{}")
    assert module._unfinished(run.path, config)
    assert module._unfinished(run.path, resolved(config.with_values({"engine.cohort-size": 3})))
    other = resolved(config.with_values({"train.learning-rate": 0.1}))
    assert not module._unfinished(run.path, other)


ROW = {
    "seed": 0,
    "rounds": 10,
    "rounds requested": 10,
    "clients": 1493,
    "left out": 120,
    "left out in clients.csv": 120,
    "without train rows": 120,
    "clients a round requested": 80,
    "clients a round": [80] * 10,
    "loss of the base": 9.0,
    "loss": 4.0,
    "resident bytes": [800, *[1000] * 9],
}


@pytest.mark.parametrize(
    ("key", "value", "failing"),
    [
        ("rounds", 9, "rounds completed"),
        ("clients", 1492, "clients known"),
        ("left out in clients.csv", 119, "clients left out with their cause"),
        ("clients a round", [80] * 9 + [79], "updates counted"),
        ("clients a round", [], "updates counted"),
        ("without train rows", 0, "clients without train rows"),
        ("loss", 8.9, "held-out loss falls"),
        ("loss", None, "held-out loss falls"),
        ("resident bytes", [800, *range(1000, 1900, 100)], "memory"),
        ("resident bytes", [800, 1000], "memory"),
    ],
)
def test_the_verdict_turns_when_a_figure_does(key, value, failing):
    assert all(check.holds for check in checks_of(ROW, clients=1613))
    row = {**copy.deepcopy(ROW), key: value}
    (failed,) = [check for check in checks_of(row, clients=1613) if not check.holds]
    assert failed.claim.startswith(f"seed 0: {failing}")
