"""Canaries in a simulation: who is in its sum, what is refused, what the audit says afterwards."""

from __future__ import annotations

import json
from statistics import fmean

import pytest

from command_line import refusal
from federation import small
from flexlora.commands.cli import main
from flexlora.errors import UserError
from flexlora.privacy.accounting import Mechanism, epsilon_of
from flexlora.privacy.canary_checks import AUDITED_METHODS
from flexlora.report.leakage import canary_report
from flexlora.runs.canary_file import CANARY_FILE, CanaryRecord
from flexlora.runs.folder import RunFolder
from flexlora.server.app import federate
from flexlora.server.settings import check_config
from flexlora.simulations.simulate import resume, simulate

CANARIES = {"audit__canaries": 24, "audit__canary_norm": 1.0, "privacy__reproducible": True}
PRIVATE = {
    "method__name": "carried",
    "method__server_learning_rate": 1.0,
    "privacy__mode": "central",
    "privacy__clip": 1.0,
    "privacy__noise_multiplier": 1.0,
    "sampling__policy": "poisson",
    "server__late_rounds": 0,
}


def audited(**changes):
    return small(**{**CANARIES, **changes})


def report_of(path, delta=None):
    return canary_report(*RunFolder.open(path), delta)


@pytest.mark.parametrize("method", AUDITED_METHODS)
def test_those_that_are_in_leave_a_trace_and_the_others_do_not(tmp_path, method):
    simulate(audited(method__name=method), tmp_path / "run")
    record = CanaryRecord.read(tmp_path / "run")
    ((weight, scores),) = record.rounds.values()
    inside = [s for s, coin in zip(scores, record.included, strict=True) if coin]
    outside = [s for s, coin in zip(scores, record.included, strict=True) if not coin]
    assert min(len(inside), len(outside)) >= 6
    # All were sampled and count alike but for their examples; the server's rate may be above 1.
    assert weight >= 1 / 28 - 1e-9
    assert 0.5 * weight < fmean(inside) < 3 * weight
    assert abs(fmean(outside)) < 0.3 * fmean(inside)
    rows = {row["client_id"]: row for row in RunFolder(tmp_path / "run").client_rows()}
    for client_id, coin in zip(record.classes, record.included, strict=True):
        assert rows[client_id]["status"] == ("ok" if coin else "failed")
    assert sum(row["status"] == "ok" for row in rows.values()) == len(inside) + 4


def test_the_losses_of_a_run_are_those_of_its_clients(tmp_path):
    simulate(audited(), tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    losses = [float(row["loss_before"]) for row in run.client_rows() if row["loss_before"]]
    assert len(losses) == 4 and min(losses) > 0
    assert min(losses) / 2 < run.metrics()[-1]["train_loss"] < 2 * max(losses)


def test_noise_keeps_the_lower_bound_below_the_accountants(tmp_path, capsys):
    config = audited(**PRIVATE, audit__canary_norm=0.0, num_server_rounds=2, fraction_train=0.5)
    simulate(config, tmp_path / "run")
    found = report_of(tmp_path / "run")
    once = Mechanism(num_clients=28, sample_share=0.5, noise_multiplier=1.0)
    assert found.upper == pytest.approx(epsilon_of([(once, 2)], 1e-5)) and found.norm == 1.0
    assert found.figures[0].lower.epsilon < found.upper and not found.refuted
    ((weight, _), _) = CanaryRecord.read(tmp_path / "run").rounds.values()
    assert weight == pytest.approx(1 / 14)
    assert main(["audit", str(tmp_path / "run"), "--part", "canaries"]) == 0
    text = capsys.readouterr().out
    assert f"proves at most {found.upper:.3g}" in text and "2 rounds" in text
    # The same scores under a ledger that claims next to nothing.
    said = refusal(["audit", tmp_path / "run", "--part", "canaries", "--delta", "1e-6"], capsys)
    assert "--delta is 1e-06, the run's ledger is kept at 1e-05" in said


def test_the_command_prints_canaries_and_json(tmp_path, capsys):
    simulate(audited(num_server_rounds=2), tmp_path / "run")
    assert main(["audit", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "the last has the hash" in text and "epsilon at least" in text and "no noise" in text
    assert main(["audit", str(tmp_path / "run"), "--part", "canaries", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["canaries"]
    assert [row["name"] for row in found["figures"]] == ["all", "rank_2", "rank_4"]
    assert found["figures"][0]["lower"]["epsilon"] > 0 and found["upper"] is None
    refused = refusal(["audit", tmp_path / "run", "--part", "canary"], capsys)
    assert "--part is 'canary', expected one of log, canaries" in refused


def test_a_resumed_run_keeps_its_coins_and_its_scores(tmp_path):
    folder = tmp_path / "run"
    simulate(audited(num_server_rounds=2), folder)
    whole = (folder / CANARY_FILE).read_bytes()
    longer = (
        (folder / "config.toml")
        .read_text()
        .replace("num-server-rounds = 2", "num-server-rounds = 3")
    )
    (folder / "config.toml").write_text(longer)
    assert report_of(folder).rounds == 2 < report_of(folder).planned
    resume(folder)
    before, after = json.loads(whole), json.loads((folder / CANARY_FILE).read_bytes())
    assert after["secret"] == before["secret"] and set(after["rounds"]) == {"1", "2", "3"}
    assert all(after["rounds"][at] == before["rounds"][at] for at in before["rounds"])
    (folder / CANARY_FILE).unlink()
    with pytest.raises(UserError, match=r"canaries.json' is gone, and with it the coins"):
        resume(folder)


def test_a_run_without_canaries_says_how_to_make_one(tmp_path, capsys):
    simulate(small(), tmp_path / "run")
    said = refusal(["audit", tmp_path / "run", "--part", "canaries"], capsys)
    assert "has no canaries" in said and "flexlora simulate --set audit.canaries=200" in said
    (tmp_path / "run" / CANARY_FILE).write_text('{"classes": {"canary_000": "rank_2"}}')
    damaged = refusal(["audit", tmp_path / "run", "--part", "canaries"], capsys)
    assert f"{CANARY_FILE}' is damaged (KeyError: 'rounds')" in damaged


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"audit__canaries": 0}, "audit.canary-norm is 1 and audit.canaries is 0"),
        ({"audit__canary_norm": 0.0}, "audit.canary-norm is 0 with audit.canaries=24 and no"),
        ({"method__name": "fedit"}, "method.name is fedit with audit.canaries=24, expected one"),
        ({"sampling__policy": "utility"}, "sampling.policy is utility with audit.canaries=24"),
        ({"server__over_selection": 0.5}, "server.over-selection is 0.5 with audit.canaries=24"),
        ({"robust__rule": "multi-krum"}, "robust.rule is multi-krum with audit.canaries=24"),
        ({"server__quorum": 2}, "server.quorum is 2 with audit.canaries=24"),
        ({"population__dropout": 0.1}, "population.dropout is 0.1 with audit.canaries=24"),
        ({"population__availability": "markov"}, r"population.\* describes devices"),
        ({**PRIVATE, "privacy__as_if_clients": 900}, "privacy.as-if-clients is 900 with audit"),
        ({**PRIVATE, "privacy__clip_quantile": 0.5}, "privacy.clip-quantile is 0.5 with audit"),
        ({**PRIVATE, "privacy__clip": 0.5}, "audit.canary-norm is 1 .* above privacy.clip=0.5"),
    ],
)
def test_what_canaries_exclude_is_refused(changes, sentence):
    check_config(audited())
    with pytest.raises(UserError, match=sentence):
        check_config(audited(**changes))


def test_canaries_are_refused_outside_of_a_simulation(tmp_path):
    with pytest.raises(UserError, match="canaries are clients of a simulation"):
        federate(None, audited(), tmp_path / "run")
