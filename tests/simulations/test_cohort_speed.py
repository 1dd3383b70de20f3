"""``flexlora reproduce cohort-speed``: what it asks of the benchmark, and a verdict that turns."""

import importlib.util
import json

import pytest

from flexlora.commands.cli import main
from flexlora.simulations.benchmarks import cohort
from flexlora.simulations.benchmarks.cohort_rows import Row
from flexlora.simulations.experiments import cohort_speed as module
from flexlora.simulations.experiments.cohort_speed import FLAGS, speed_checks

ROWS = [
    Row(name="steady, ours over flower", ratio=4.0, target=1.5, error=1e-4, allowed_error=1e-3),
    Row(name="whole, ours over loop", ratio=0.9, target=0.0, error=1e-4, allowed_error=1e-3),
    Row(name="memory", ratio=1.05, target=1.1, at_most=True),
]


@pytest.fixture
def called(monkeypatch):
    """The benchmark's command lines; it is not run."""
    lines = []

    def record(arguments):
        lines.append(arguments)
        return ROWS

    monkeypatch.setattr(cohort, "main", record)
    monkeypatch.setattr(module, "find_spec", lambda package: package)
    return lines


def options(line):
    return vars(cohort._parser().parse_args(line))


def test_the_benchmark_is_asked_for_each_seed_at_the_scale(called, tmp_path):
    assert main(["reproduce", "cohort-speed", "--out", str(tmp_path / "a")]) == 0
    assert [options(line)["seed"] for line in called] == [0, 1, 2]
    whole = options(called[0])
    defaults = options([])
    assert {k: whole[k] for k in ("clients", "rounds")} == {
        k: defaults[k] for k in ("clients", "rounds")
    }
    called.clear()
    arguments = ["reproduce", "cohort-speed", "--scale", "0.1", "--out", str(tmp_path / "b")]
    sets = {"model.name": "M", "data.path": "D", "train.max-steps": "2", "clients.count": "5"}
    for key, value in sets.items():
        arguments += ["--set", f"{key}={value}"]
    assert main(arguments) == 0
    (small,) = map(options, called)
    assert small["rounds"] == 3 > small["warmup"] and small["clients"] == 5
    assert (small["model"], small["data"], small["steps"]) == ("M", "D", 2)
    assert main(arguments) == 0 and len(called) == 1  # its numbers are kept
    rows = json.loads((tmp_path / "b/results.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == [row.name for row in ROWS]


def test_every_flag_is_one_of_the_benchmark_s():
    for key, flag in FLAGS.items():
        value = "7" if key not in ("model.name", "data.path", "method.name") else "residual"
        assert options([flag, value])[flag[2:].replace("-", "_")] in (7, "residual")


def test_other_keys_and_missing_peers_are_told_in_one_sentence(monkeypatch, capsys, tmp_path):
    arguments = ["reproduce", "cohort-speed", "--out", str(tmp_path)]
    assert main([*arguments, "--set", "lora.alpha=3"]) == 2
    error = capsys.readouterr().err
    assert "lora.alpha is not read by 'cohort-speed', expected some of clients.count" in error
    absent = {"ray"}
    find = importlib.util.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in absent else find(name))
    assert main(arguments) == 2
    assert "finds no ray; run pip install 'flexlora[ray]'" in capsys.readouterr().err


def rows_of(**changes):
    """The rows as they are kept, twice, with the second one's figures changed."""
    kept = [{"arm": row.name, **vars(row)} for row in ROWS]
    return [*kept, *({**row, **changes} for row in kept)]


def test_targets_are_of_scale_1_and_the_same_work_of_any():
    checks = speed_checks(rows_of())
    assert all(check.holds for check in checks)
    assert [check.judged(0.1) for check in checks] == [False, False, True]
    assert [check.expected for check in checks] == [1.5, 1.1, 0.0]
    assert [check.tolerance for check in checks] == [0.0, 0.0, 1e-3]
    assert not any(check.holds for check in speed_checks([]))


def test_the_verdict_turns_with_a_ratio_or_an_error():
    slow = [check for check in speed_checks(rows_of(ratio=-2.0)) if not check.holds]
    assert [check.claim for check in slow] == ["steady, ours over flower"]
    large = [check for check in speed_checks(rows_of(ratio=9.0)) if not check.holds]
    assert [check.claim for check in large] == ["memory"]
    other_work = [check for check in speed_checks(rows_of(error=2e-3)) if not check.holds]
    assert [check.seen for check in other_work] == [2e-3]
    assert "differ from ours" in other_work[0].claim
