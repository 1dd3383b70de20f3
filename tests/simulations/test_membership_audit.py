"""``flexlora audit --part membership``: rows that were trained on many times are found."""

from __future__ import annotations

import json

import pytest

from command_line import refusal
from federation import small
from flexlora.clients.worker import worker_for
from flexlora.commands.cli import main
from flexlora.runs.folder import RunFolder
from flexlora.simulations.membership import _trained_rows, membership_of_run
from flexlora.simulations.simulate import simulate

LEARNT = {
    "population__examples": "6",
    "method__name": "carried",
    "num_server_rounds": 2,
    "train__max_steps": 20,
    "train__per_device_train_batch_size": 6,
    "train__learning_rate": 0.03,
    "ranks__tiers": "8,16",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("membership") / "run"
    simulate(small(**LEARNT), path)
    return path


def test_rows_learnt_by_heart_are_told_from_others(run):
    rows = {(row.adapter, row.score): row.found for row in membership_of_run(run)}
    assert {name for name, _ in rows} == {"global", "rank_8", "rank_16"}
    for score in ("loss", "loss against base"):
        found = rows["global", score]
        assert found.members == 24 and found.others > 20
        assert found.auc > 0.6 and found.auc_interval[0] > 0.5
    assert rows["rank_8", "loss"].members + rows["rank_16", "loss"].members == 24


def test_members_are_the_rows_of_the_rounds_that_counted(run):
    config = RunFolder.open(run)[1]
    worker = worker_for(config)
    trained = _trained_rows(RunFolder(run), worker)
    assert {client_id: len(rows) for client_id, rows in trained.items()} == dict.fromkeys(
        worker.client_ids, 6
    )


def test_the_command_prints_it(run, capsys):
    assert main(["audit", str(run), "--part", "membership", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["membership"]
    assert len(rows) == 9 and {"adapter", "score", "auc", "tpr"} <= set(rows[0])


def test_rows_that_are_not_at_hand(run, tmp_path, capsys):
    text = (run / "config.toml").read_text()
    gone = run.parent / "gone"
    gone.mkdir()
    for name in ("metrics.jsonl", "clients.csv", "environment.json"):
        (gone / name).write_bytes((run / name).read_bytes())
    (gone / "checkpoint").symlink_to(run / "checkpoint")
    (gone / "config.toml").write_text(text.replace('path = ""', 'path = "/no/such/folder"', 1))
    said = refusal(["audit", gone, "--part", "membership"], capsys)
    assert "are not at hand" in said and "/no/such/folder" in said
