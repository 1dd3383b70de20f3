"""Samples: the same answers as the models give, drawn by the seed, and never by surprise."""

from __future__ import annotations

import json

import pytest

from federation import small
from flexlora.clients.worker import worker_for
from flexlora.commands.cli import main
from flexlora.config.resolve import resolved
from flexlora.errors import UserError
from flexlora.evaluation.evaluate import BASE
from flexlora.runs.folder import RunFolder
from flexlora.runs.samples_file import read_samples
from flexlora.simulations import samples as samples_module
from flexlora.simulations.samples import LONGEST_ANSWER, _cut, sample_run
from flexlora.simulations.scoring import held_out_scores
from flexlora.simulations.simulate import simulate
from flexlora.wire.jobs import EvalJob

GENERATES = {"eval__generate": "ends", "eval__max_new_tokens": 4, "eval__max_examples": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run under ``carried`` with personal factors: its folder."""
    folder = tmp_path_factory.mktemp("samples") / "run"
    config = small(method__name="carried", personal__rank=2, personal__max_steps=1, **GENERATES)
    simulate(config, folder)
    return folder


def test_a_run_that_generates_leaves_samples_and_the_command_takes_the_same(run, capsys):
    before = (run / "samples.json").read_bytes()
    found = read_samples(run, 1)
    assert found.round == 1 and len(found.samples) == 4
    assert all({*sample.answers} == {"base", "global", "personal"} for sample in found.samples)
    (run / "samples.json").unlink()
    assert main(["report", "--samples", str(run)]) == 0
    assert (run / "samples.json").read_bytes() == before
    assert "Answers" in (run / "report.html").read_text()


def test_losses_are_those_of_the_evaluation(run):
    """On all evaluated rows, which are fewer than are drawn: the evaluation's own loss."""
    folder, config = RunFolder.open(run)
    found, last = read_samples(run, 1), folder.metrics()[-1]
    worker = worker_for(resolved(config))
    assert found.rows == sum(len(worker.held_out(client)) for client in worker.client_ids)
    for name, loss in found.losses.items():
        assert loss.served == pytest.approx(last[f"eval_loss/{name}"], rel=1e-4)
    state, classes = folder.load_checkpoint()
    adapter = state.change.adapter(2, config.lora.alpha, seed=config.seed)
    score = held_out_scores(worker, {"two": adapter})["two"]
    assert found.losses["rank_2"].truncated == pytest.approx(score.loss / score.tokens, rel=1e-4)
    assert found.losses["rank_2"].truncated != pytest.approx(found.losses["rank_2"].served)
    assert {r.name for r in classes.values()} == {*found.losses}


def test_the_base_answers_as_the_evaluation_hears_it(run):
    """A sample whose answer is the reference is an exact match of the evaluation, and only it."""
    _, config = RunFolder.open(run)
    worker, found = worker_for(resolved(config)), read_samples(run, 1)
    for sample in found.samples:
        rows = worker.held_out(sample.client_id)
        job = EvalJob(client_id=sample.client_id, server_round=0, adapters={}, generate=True)
        (result,) = worker.evaluate([job])
        right = sample.answers["base"] == sample.reference
        assert sample.prompt in [_cut(row.prompt, 600) for row in rows]
        assert right <= (result.scores[BASE].exact_match > 0)


def test_no_samples_without_generation_and_none_of_a_private_run(tmp_path):
    simulate(small(), tmp_path / "plain")
    assert not (tmp_path / "plain" / "samples.json").exists()
    changes = {"privacy__mode": "example", "privacy__clip": 1.0, "privacy__noise_multiplier": 1.0}
    private = small(method__name="carried", **GENERATES, **changes)
    simulate(private, tmp_path / "private")
    assert not (tmp_path / "private" / "samples.json").exists()


def test_samples_that_fail_fail_no_run(tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise ZeroDivisionError("no rows")

    monkeypatch.setattr(samples_module, "take_samples", broken)
    simulate(small(eval__generate="ends", eval__max_new_tokens=1), tmp_path / "run")
    assert "no samples were taken (ZeroDivisionError: no rows)" in caplog.text
    assert not (tmp_path / "run" / "samples.json").exists()


def test_a_run_whose_rows_are_elsewhere_is_refused(run, tmp_path):
    """A run over real nodes has noted its base and no rows."""
    index = json.loads((run / "checkpoint" / "current.json").read_text())
    index["notes"]["sources"]["rows"] = {}
    copy = tmp_path / "run"
    for name in ("config.toml", "environment.json"):
        copy.mkdir(exist_ok=True)
        (copy / name).write_bytes((run / name).read_bytes())
    (copy / "checkpoint").mkdir()
    (copy / "checkpoint" / "current.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="the rows of its clients are not on this machine"):
        sample_run(str(copy))


def test_a_long_text_keeps_its_ends():
    assert _cut("short", LONGEST_ANSWER) == "short"
    cut = _cut("a" * 300 + "b" * 300, LONGEST_ANSWER)
    assert cut.startswith("aa") and cut.endswith("bb") and "[...]" in cut
    assert len(cut) < LONGEST_ANSWER + 10
