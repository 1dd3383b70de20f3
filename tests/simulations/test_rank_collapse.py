"""Rank collapse: the law through the real methods, the tail of real runs, verdicts that turn."""

import copy
import csv
import json

import pytest
import torch

from flexlora.aggregation.engine.state import GlobalChange
from flexlora.algebra.linalg import FactoredSVD
from flexlora.commands.cli import main
from flexlora.lora.ranks import RankClass
from flexlora.simulations.experiments import rank_collapse as module
from flexlora.simulations.experiments.rank_collapse import ARMS, law_checks, run_checks
from flexlora.simulations.experiments.rank_law import ATTENTION, CASES, COLLAPSES, MLP, measure
from flexlora.simulations.experiments.tails import kept_by_law, kept_of_tail, tail_share
from one_round import global_change

SMALL = (
    "clients.count=4",
    "fraction-train=1.0",
    "train.max-steps=2",
    "train.per-device-train-batch-size=2",
    "eval.max-examples=1",
    "engine.threads=1",
)


# --- the law -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", COLLAPSES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_every_value_of_an_untrained_round_is_the_law_s(case, method):
    measured = measure(case, method, rounds=3, seed=1, collapses=COLLAPSES[method])
    assert measured.worst() < 1e-6
    assert set(measured.seen) == {ATTENTION, MLP}


@pytest.mark.parametrize("method", COLLAPSES)
def test_no_method_follows_the_other_law(method):
    """The negative control: a distance that is always small would show nothing."""
    measured = measure(CASES[0], method, rounds=2, seed=1, collapses=not COLLAPSES[method])
    assert measured.worst() > 0.5


def test_the_figures_of_the_design_are_seen():
    """80 % of the clients at rank 8: sigma_20 falls 1, 0.2, 0.04, 0.008; the others keep it."""
    for method, law in (("flexlora", [1, 0.2, 0.04, 0.008]), ("residual", [1, 1, 1, 1])):
        measured = measure(CASES[0], method, rounds=3, seed=0, collapses=COLLAPSES[method])
        assert measured.band(20)["seen"] == pytest.approx(law, rel=1e-9)
        assert measured.band(8)["seen"] == pytest.approx([1, 1, 1, 1], rel=1e-9)
        beyond = measured.band(33)["seen"][1:]
        assert beyond == ([0, 0, 0] if method == "flexlora" else pytest.approx([1, 1, 1]))


def test_shares_are_of_rows_not_of_clients_and_go_by_module():
    """Half the clients are weak and hold four rows of five; type 3 trains 200 in the MLP only."""
    assert CASES[2].shares_of_weight(ATTENTION, 17).tolist() == pytest.approx(
        [1.0] * 4 + [0.2] * 12 + [0.0]
    )
    paper = CASES[3]
    attention, mlp = (paper.shares_of_weight(name, 204) for name in (ATTENTION, MLP))
    places = [7, 8, 29, 30, 199, 200]
    assert attention[places].tolist() == pytest.approx([1, 0.2, 0.2, 0.1, 0.1, 0])
    assert mlp[places].tolist() == pytest.approx([1, 0.2, 0.2, 0.15, 0.15, 0])


def rows_of_law():
    rows = []
    for method in COLLAPSES:
        measured = measure(CASES[1], method, rounds=3, seed=0, collapses=COLLAPSES[method])
        bands = [measured.band(direction) for direction in CASES[1].bands()]
        row = {"arm": f"case: {method}", "seed": 0, "method": method, "worst": measured.worst()}
        rows.append({**row, "bands": bands})
    return rows


def test_the_verdict_on_the_law_turns_when_a_number_does():
    rows = rows_of_law()
    assert [band["direction"] for band in rows[0]["bands"]] == [3, 9, 17]
    assert all(check.holds and check.judged(0.1) for check in law_checks(rows))
    assert len(law_checks(rows)) == 2 * len(COLLAPSES)
    for index, row in enumerate(rows):
        turned = copy.deepcopy(rows)
        turned[index]["bands"][0]["seen"][-1] *= 1 + 1e-5
        (failed,) = [check for check in law_checks(turned) if not check.holds]
        assert failed.claim == f"{row['arm']} keeps of sigma_3 in 3 rounds"
        turned = copy.deepcopy(rows)
        turned[index]["worst"] = 2e-6
        (failed,) = [check for check in law_checks(turned) if not check.holds]
        assert failed.claim.startswith(f"{row['method']}, largest")


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
    laws = [row for row in kept["rows"] if "worst" in row]
    runs = {row["arm"]: row["rounds"] for row in kept["rows"] if "rounds" in row}
    assert len(laws) == len(CASES) * len(COLLAPSES)
    assert list(runs) == [arm.title for arm in ARMS]
    for arm, rounds in zip(ARMS, runs.values(), strict=True):
        assert [own["round"] for own in rounds] == [2]  # round 1 begins from no change
        folder = out / "runs" / f"{arm.title.lower().replace(' ', '-')}-0"
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        assert [m["eval_loss"] for m in metrics[2:]] == [own["loss"] for own in rounds]


def test_a_tail_s_share_agrees_with_the_run_s_own_modules(small_run):
    """``metrics.jsonl`` has it by module; together, weighted by their energies, they are ours."""
    _, out = small_run
    kept = json.loads((out / "results.json").read_text())
    (rounds,) = [row["rounds"] for row in kept["rows"] if row["arm"] == "residual"]
    lines = (out / "runs/residual-0/metrics.jsonl").read_text().splitlines()
    for own, line in zip(rounds, lines[2:], strict=True):
        modules = json.loads(line)["modules"].values()
        tails = sum(m["tail_energy"] * m["energy"] for m in modules)
        share = tails / sum(m["energy"] for m in modules)
        assert own["share"] == pytest.approx(share, rel=1e-4)


def test_kept_runs_are_not_run_again(small_run, monkeypatch):
    status, out = small_run
    before = (out / "results.json").read_bytes()
    monkeypatch.setattr(module, "measure", None)
    monkeypatch.setattr("flexlora.simulations.experiments.series.RUNNERS", {})
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
    (rounds,) = [r["rounds"] for r in kept["rows"] if r["arm"] == "FlexLoRA as published"]
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
    return [{"arm": arm, "seed": 0, "rounds": rounds} for arm, rounds in courses.items()]


@pytest.mark.parametrize(
    ("arm", "key", "value", "failing"),
    [
        (0, "kept", 0.9, ["FlexLoRA as published keeps"]),
        (0, "law", 0.9, ["FlexLoRA as published keeps"]),
        (1, "kept", 0.5, ["residual keeps"]),
        (2, "kept", 1.4, ["carried keeps"]),
        (1, "share", 0.002, ["FlexLoRA as published ends with this part"]),
        (2, "loss", 0.45, ["FlexLoRA as published ends with a loss above that of carried"]),
    ],
)
def test_the_verdict_on_runs_turns_when_a_number_does(arm, key, value, failing):
    rows = rows_of_runs()
    assert all(check.holds for check in run_checks(rows))
    assert not any(check.judged(0.5) for check in run_checks(rows))
    for own in rows[arm]["rounds"]:
        own[key] = value
    failed = [check.claim for check in run_checks(rows) if not check.holds]
    assert len(failed) == len(failing)
    assert all(claim.startswith(begin) for claim, begin in zip(failed, failing, strict=True))


def test_without_runs_nothing_holds():
    assert not any(check.holds for check in run_checks([]))


def test_a_key_that_the_arms_decide_is_refused_before_anything_is_kept(tmp_path, capsys):
    arguments = ["reproduce", "rank-collapse", "--out", str(tmp_path), "--set", "eval.every=2"]
    assert main(arguments) == 2 and list(tmp_path.iterdir()) == []
    assert "eval.every is set by the experiment 'rank-collapse'" in capsys.readouterr().err
