"""``start-from``: a new run whose round 0 is what another one has learned."""

from __future__ import annotations

import shutil

import pytest
from test_flower_resume import served

from federation import adapter_bytes, rounds, same_bytes, small
from flexlora.commands.cli import main
from flexlora.errors import UserError
from flexlora.runs.checkpoints import load_checkpoint
from flexlora.simulations.simulate import resume, simulate

CONFIG = small(num_server_rounds=2, clients__count=2, method__name="residual")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    simulate(CONFIG, folder)
    return folder


def after(first, **changes):
    return CONFIG.with_values({"start-from": str(first), **changes})


def test_round_0_is_the_other_runs_last_round_and_it_learns_on(first, tmp_path):
    simulate(after(first), tmp_path / "run")
    before, new = rounds(first), rounds(tmp_path / "run")
    assert [row["round"] for row in new] == [0, 1, 2]
    assert new[0]["eval_loss"] == before[-1]["eval_loss"] != before[0]["eval_loss"]
    kept, _ = load_checkpoint(first / "checkpoint")
    state, _ = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert state.round == 2 and not same_bytes(state, kept)
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(first)


def test_it_resumes_without_the_other_run(first, tmp_path):
    other = shutil.copytree(first, tmp_path / "other")
    simulate(after(other), tmp_path / "whole")
    simulate(after(other, **{"num-server-rounds": 1}), tmp_path / "run")
    text = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(
        text.replace("num-server-rounds = 1", "num-server-rounds = 2")
    )
    shutil.rmtree(other)
    resume(tmp_path / "run")
    assert [row["round"] for row in rounds(tmp_path / "run")] == [0, 1, 2]


REFUSED = {
    "no run": ({"start-from": "nowhere"}, "'nowhere' is not a run folder"),
    "another method": ({"method.name": "flexlora"}, "a run of method.name=residual, expected one"),
    "other modules": ({"lora.target-modules": "k_proj"}, r"whose module '.*' is .*, expected"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_started_from_is_one_sentence(kind, first, tmp_path):
    changes, sentence = REFUSED[kind]
    with pytest.raises(UserError, match=sentence):
        simulate(after(first, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_base_is_refused_unless_it_is_allowed(first, tmp_path, capsys):
    other = shutil.copytree(first, tmp_path / "other")
    index = other / "checkpoint" / "current.json"
    index.write_text(index.read_text().replace('"base": "', '"base": "0'))
    words = ["simulate", "--out", str(tmp_path / "run"), "--set", "clients.count=2"]
    for key, value in after(other).changed().items():
        words += ["--set", f"{key}={value}"]
    assert main(words) == 2
    assert "base 'embedded' has changed" in capsys.readouterr().err


def test_what_is_final_says_so_to_the_supervisor_and_too_few_nodes_do_not(worker, tmp_path):
    """``flexlora server run`` reads it in Flower's word on the run."""
    out = {"out": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"^not to be tried again: 'nowhere' is not a run folder"):
        served(worker, CONFIG.with_values({"start-from": "nowhere", **out}))
    few = {"server.min-nodes": 99, "server.wait-seconds": 0.0, **out}
    with pytest.raises(UserError, match=r"^\d+ nodes are connected"):
        served(worker, CONFIG.with_values(few))
