"""``flexlora eval`` on a run: unseen tasks and clients, choices, patterns, personal factors."""

import json
import math

import pytest

from command_line import refusal
from federation import small
from flexlora.clients import worker as workers
from flexlora.commands.cli import main
from flexlora.evaluation.evaluate import BASE
from flexlora.runs.folder import RunFolder
from flexlora.simulations.score_report import score_report
from flexlora.simulations.scoring import Cell
from flexlora.simulations.simulate import simulate
from flexlora.wire.jobs import Score

WORDS = ("lomat", "sare", "riby", "tamol", "nevo", "dipa")


def rows_of(client, k, split):
    """A row of each of three tasks; task ``size`` is multiple choice, ``last`` has a pattern."""
    word, seed = WORDS[(k + len(split)) % len(WORDS)], {"client": client}
    return [
        {**seed, "task": "say", "category": "copy", "instruction": "Say.", "output": word},
        {
            **seed,
            **{"task": "size", "category": "choose", "question": f"Which is {word}?"},
            **{"choices": [word, "mid", "high"], "answer": k % 3},
        },
        {
            **seed,
            **{"task": "last", "category": "copy", "instruction": "Last letter."},
            **{"output": word[-1], "input": word, "pattern": "[a-z]"},
        },
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two rounds of six clients: one held out, and task ``last`` trained by nobody."""
    place = tmp_path_factory.mktemp("scoring")
    (place / "rows").mkdir()
    for split in ("train", "validation", "test"):
        rows = [row for k in range(6) for row in rows_of(f"c{k}", k, split)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / "rows" / f"{split}.jsonl").write_text(text)
    config = small(
        data__path=str(place / "rows"),
        data__held_out_tasks="last",
        clients__count=0,
        clients__held_out=0.2,
        fraction_train=1.0,
        num_server_rounds=1,
        train__max_steps=2,
        personal__rank=1,
        personal__max_steps=2,
        eval__max_new_tokens=2,
        eval__generate="never",
        eval__max_examples=0,
        lora__target_modules="q_proj",
        ranks__tiers="1,2",
        ranks__shares="0.5,0.5",
        method__name="flexlora",
    )
    simulate(config, place / "run")
    assert main(["eval", str(place / "run"), "--json", str(place / "scores.json")]) == 0
    return place


@pytest.fixture(scope="module")
def report(made):
    return json.loads((made / "scores.json").read_text())


def test_nobody_trained_on_what_is_held_out(made):
    run = RunFolder(made / "run")
    left_out = {row["client_id"]: row["cause"] for row in run.client_rows() if row["cause"]}
    assert len(left_out) == 1 and "held out" in next(iter(left_out.values()))
    trained = [row for row in run.client_rows() if row["status"] == "ok"]
    assert [int(row["num_examples"]) for row in trained] == [2] * 5, "of three train rows each"


def test_the_rounds_of_the_run_score_no_held_out_task(made):
    rounds = RunFolder(made / "run").metrics()
    assert "eval_acc" in rounds[0] and "eval_bits_per_byte" in rounds[0]
    evaluated = (made / "run" / "evaluation.csv").read_text().splitlines()[1:]
    assert {line.rsplit(",", 1)[1] for line in evaluated} == {"2"}, "rows of each of the clients"


def test_seen_and_unseen_clients_and_tasks_are_told_apart(report):
    rows = {name: part["adapters"][BASE]["rows"] for name, part in report["groups"].items()}
    assert rows == {
        "seen clients, seen tasks": 10,
        "seen clients, unseen tasks": 5,
        "unseen clients, seen tasks": 2,
        "unseen clients, unseen tasks": 1,
    }
    assert report["all"]["adapters"][BASE]["rows"] == 18
    assert set(report["tasks"]) == {"say", "size", "last"}
    assert set(report["categories"]) == {"copy", "choose"}
    assert len(report["clients"]) == 6


def test_metrics_belong_to_the_rows_that_have_them(report):
    assert "acc" in report["tasks"]["size"]["adapters"]["rank_2"]
    assert "acc" not in report["tasks"]["say"]["adapters"]["rank_2"]
    assert "pattern" in report["tasks"]["last"]["adapters"]["rank_2"]
    assert "pattern" not in report["tasks"]["size"]["adapters"]["rank_2"]


def test_global_personal_and_base_are_compared_with_intervals(report):
    found = {
        (row["adapter"], row["against"]): row
        for row in report["all"]["differences"]
        if row["metric"] == "loss"
    }
    names = {name for pair in found for name in pair}
    assert {("rank_1", BASE), ("personal", BASE), ("personal", "own class")} <= set(found)
    assert names <= {BASE, "rank_1", "rank_2", "own class", "personal"}
    for row in found.values():
        assert row["low"] <= row["value"] <= row["high"]
    assert found["rank_1", BASE]["clients"] == 6
    assert found["personal", BASE]["clients"] == 5, "the held-out client has no personal factors"
    adapters = report["all"]["adapters"]
    gap = adapters["rank_1"]["loss"] - adapters[BASE]["loss"]
    assert found["rank_1", BASE]["value"] == pytest.approx(gap)
    assert adapters[BASE]["perplexity"] == pytest.approx(math.exp(adapters[BASE]["loss"]))


def test_an_adapter_folder_on_rows_that_name_clients_has_intervals_too(made, tmp_path, capsys):
    out = tmp_path / "scores.json"
    target = str(made / "run" / "adapters" / "rank_2")
    arguments = ["eval", target, "--data", str(made / "rows"), "--json", str(out)]
    workers._workers.clear()
    assert main([*arguments, "--set", "eval.generate=never"]) == 0
    report = json.loads(out.read_text())
    assert report["all"]["clients"] == 6 and "rouge_l" not in report["all"]["adapters"][BASE]
    assert report["all"]["differences"][0]["low"] is not None
    assert "6 clients" in capsys.readouterr().out


def test_unknown_tasks_are_refused_before_anything_is_trained(made, tmp_path, capsys):
    sets = ["--set", f"data.path={made}/rows", "--set", "data.held-out-tasks=lost"]
    message = refusal(["simulate", *sets, "--out", str(tmp_path / "run")], capsys)
    assert "has 'lost', which is no task or category" in message and "'last'" in message
    assert not (tmp_path / "run").exists()


def cell(client, **losses):
    scores = {name: Score(loss=loss, tokens=10, rows=1) for name, loss in losses.items()}
    return Cell(
        client_id=client,
        category="",
        task="",
        trained_client=True,
        trained_task=True,
        scores=scores,
    )


def test_adapters_that_score_alike_up_to_rounding_are_compared_once():
    cells = [cell(f"c{k}", base=30.0 + k, a=20.0, b=20.0 * (1 + 1e-8), c=21.0) for k in range(3)]
    report = score_report(cells, seed=0)
    assert report["equal_adapters"] == [["a", "b"]]
    assert [r["adapter"] for r in report["all"]["differences"]] == ["a", "c"]
    assert set(report["all"]["adapters"]) == {"base", "a", "b", "c"}
