"""Rank collapse: the tail of real runs, and verdicts that turn."""

import csv
import json

import pytest
import torch

from flexlora.aggregation.engine.state import GlobalChange
from flexlora.algebra.linalg import FactoredSVD
from flexlora.commands.cli import main
from flexlora.lora.ranks import RankClass
from flexlora.simulations.experiments.rank_collapse import VARIANTS, run_checks
from flexlora.simulations.experiments.tail_energy import kept_by_law, kept_of_tail, tail_share
from one_round import global_change
from rank_law import ATTENTION, CASES, measure

SMALL = (
    "clients.count=4",
    "fraction-train=1.0",
    "train.max-steps=2",
    "train.per-device-train-batch-size=2",
    "eval.max-examples=1",
    "engine.threads=1",
)


# --- the tail of a run -------------------------------------------------------------------------


def test_what_is_kept_of_a_tail_is_its_projection():
    last = global_change(5)
    weak = dict.fromkeys(last, 2)
    assert kept_of_tail(last, last, weak) == pytest.approx(1.0)
    cut = last.map(lambda svd: svd.truncate(2))
    assert kept_of_tail(last, cut, weak) == pytest.approx(0.0, abs=1e-12)
    assert tail_share(cut, weak) == pytest.approx(0.0, abs=1e-12)
    half = last.map(lambda svd: FactoredSVD(U=svd.U, S=0.5 * svd.S, Vh=svd.Vh))
    assert kept_of_tail(last, half, weak) == pytest.approx(0.5)
    assert tail_share(half, weak) == pytest.approx(tail_share(last, weak))
    S = 0.67 ** torch.arange(5).double()
    assert tail_share(last, weak) == pytest.approx(float(S[2:].square().sum() / S.square().sum()))
    assert kept_of_tail(cut, last, weak) is None and kept_by_law(cut, weak, {}) is None


def test_the_law_s_share_of_a_tail_is_what_an_untrained_round_of_the_published_form_keeps():
    """Against the method itself: the law of ``rank_law`` over the classes' rows."""
    case = CASES[1]
    measured = measure(case, "flexlora", rounds=1, seed=3, collapses=True)
    weights = {}
    for _, kind, rows in case.clients():
        weights[kind] = weights.get(kind, 0) + rows
    S, after = measured.seen[ATTENTION]
    rank, shape = S.shape[0], dict(case.shapes)[ATTENTION]
    eye = [torch.eye(side, dtype=torch.float64) for side in shape]
    last = GlobalChange({ATTENTION: FactoredSVD(U=eye[0][:, :rank], S=S, Vh=eye[1][:rank])})
    kept = float((S[2:] * after[2:]).sum() / S[2:].square().sum())
    assert kept_by_law(last, {ATTENTION: 2}, weights) == pytest.approx(kept)
    assert kept_by_law(last, {ATTENTION: 2}, {RankClass.of(2): 5}) == 0.0


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("collapse")
    arguments = ["reproduce", "rank-collapse", "--seeds", "1", "--scale", "0.3", "--out", str(out)]
    for item in SMALL:
        arguments += ["--set", item]
    return main(arguments), out


def test_the_experiment_runs_keeps_its_numbers_and_tells_a_verdict(small_run, capsys):
    status, out = small_run
    kept = json.loads((out / "results.json").read_text())
    assert status == 0 and kept["scale"] == 0.3
    runs = {row["variant"]: row["rounds"] for row in kept["rows"] if "rounds" in row}
    assert list(runs) == [variant.title for variant in VARIANTS]
    for variant, rounds in zip(VARIANTS, runs.values(), strict=True):
        assert [own["round"] for own in rounds] == [2]  # round 1 begins from no change
        folder = out / "runs" / f"{variant.title.lower().replace(' ', '-')}-0"
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        assert [m["eval_loss"] for m in metrics[2:]] == [own["loss"] for own in rounds]


def test_a_tail_s_share_agrees_with_the_run_s_own_modules(small_run):
    """``metrics.jsonl`` has it by module; together, weighted by their energies, they are ours."""
    _, out = small_run
    kept = json.loads((out / "results.json").read_text())
    (rounds,) = [row["rounds"] for row in kept["rows"] if row["variant"] == "residual"]
    lines = (out / "runs/residual-0/metrics.jsonl").read_text().splitlines()
    for own, line in zip(rounds, lines[2:], strict=True):
        modules = json.loads(line)["modules"].values()
        tails = sum(m["tail_energy"] * m["energy"] for m in modules)
        share = tails / sum(m["energy"] for m in modules)
        assert own["share"] == pytest.approx(share, rel=1e-4)


def test_kept_runs_are_not_run_again(small_run, monkeypatch):
    status, out = small_run
    before = (out / "results.json").read_bytes()
    monkeypatch.setattr("flexlora.simulations.experiments.variant_table.RUNNERS", {})
    arguments = ["reproduce", "rank-collapse", "--seeds", "1", "--scale", "0.3", "--out", str(out)]
    assert main(arguments + [word for item in SMALL for word in ("--set", item)]) == status
    assert (out / "results.json").read_bytes() == before


def test_the_law_of_a_round_counts_only_rows_that_came(small_run):
    """By hand from clients.csv: who sent an update in round 2, at which rank, with how many rows"""
    _, out = small_run
    kept = json.loads((out / "results.json").read_text())
    folder = out / "runs/flexlora-as-published-0"
    with (folder / "clients.csv").open() as file:
        came = [r for r in csv.DictReader(file) if r["round"] == "2" and r["status"] == "ok"]
    strong = sum(int(r["num_examples"]) for r in came if int(r["rank"]) > 2)
    whole = sum(int(r["num_examples"]) for r in came)
    (rounds,) = [r["rounds"] for r in kept["rows"] if r["variant"] == "FlexLoRA as published"]
    assert 0.0 < rounds[0]["law"] <= strong / whole + 1e-9


# --- the verdict on runs -----------------------------------------------------------------------


def rows_of_runs():
    def course(kept, share, loss):
        return [
            {"round": r, "kept": kept, "law": 0.15, "share": share, "loss": loss} for r in (2, 3)
        ]

    courses = {
        "FlexLoRA as published": course(0.25, 0.001, 0.42),
        "residual": course(1.03, 0.065, 0.37),
        "carried": course(1.03, 0.075, 0.27),
    }
    return [
        {"variant": variant, "seed": 0, "rounds": rounds} for variant, rounds in courses.items()
    ]


@pytest.mark.parametrize(
    ("variant", "key", "value", "failing"),
    [
        (0, "kept", 0.9, ["FlexLoRA as published keeps"]),
        (0, "law", 0.9, ["FlexLoRA as published keeps"]),
        (1, "kept", 0.5, ["residual keeps"]),
        (2, "kept", 1.4, ["carried keeps"]),
        (1, "share", 0.002, ["FlexLoRA as published ends with this part"]),
        (2, "loss", 0.45, ["FlexLoRA as published ends with a loss above that of carried"]),
    ],
)
def test_the_verdict_on_runs_turns_when_a_number_does(variant, key, value, failing):
    rows = rows_of_runs()
    assert all(check.holds for check in run_checks(rows))
    assert not any(check.judged(0.5) for check in run_checks(rows))
    for own in rows[variant]["rounds"]:
        own[key] = value
    failed = [check.claim for check in run_checks(rows) if not check.holds]
    assert len(failed) == len(failing)
    assert all(claim.startswith(begin) for claim, begin in zip(failed, failing, strict=True))


def test_without_runs_nothing_holds():
    assert not any(check.holds for check in run_checks([]))


def test_a_key_that_the_variants_decide_is_refused_before_anything_is_kept(tmp_path, capsys):
    arguments = ["reproduce", "rank-collapse", "--out", str(tmp_path), "--set", "eval.every=2"]
    assert main(arguments) == 2 and list(tmp_path.iterdir()) == []
    assert "eval.every is set by the experiment 'rank-collapse'" in capsys.readouterr().err
