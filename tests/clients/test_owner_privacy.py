"""A node that adds noise: its ledger on disk, its owner's budget, what a server may ask."""

from __future__ import annotations

import json

import pytest

from flexlora.clients.trainer.limits import PrivacyLimits
from flexlora.clients.trainer.privacy_ledger import PrivacyLedger, Spent
from flexlora.clients.trainer.privacy_rules import PrivacyRules
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.privacy.accounting import Mechanism
from flexlora.privacy.client_rounds import client_epsilon, client_round
from packed import trained
from trainers import (
    asked,
    cause_of,
    context_of,
    query_message,
    resident,
    run_config,
    train_message,
    write_rows,
)

NOISE = {"privacy__mode": "local", "privacy__clip": 1.0, "privacy__noise_multiplier": 4.0}
LOCAL = run_config(method__name="basis", **NOISE)
EXAMPLE = run_config(**{**NOISE, "privacy__mode": "example"}).with_values({"lora.dropout": 0.0})
PLAIN = run_config(method__name="basis")
DELTA = 1e-5


def epsilon_after(*rounds):
    return client_epsilon(rounds, DELTA)


LOCAL_ROUND = client_round(LOCAL, 12)
EXAMPLE_ROUND = client_round(EXAMPLE, 12)


def rules(path, **limits):
    return PrivacyRules(PrivacyLimits(**limits), PrivacyLedger(path / "privacy.json"))


# The ledger


def test_what_was_spent_is_there_after_a_restart(tmp_path):
    first = rules(tmp_path)
    for run in ("7", "7", "8"):
        first.spend(LOCAL, run, 12)
    first.spend(EXAMPLE, "7", 12)
    first.spend(PLAIN, "7", 12)  # nothing: a run without noise has no epsilon
    again = PrivacyLedger(tmp_path / "privacy.json")
    assert again.spent() == first.ledger.spent() and len(again.spent()) == 3
    counts = {(s.whole, s.count) for s in again.spent("7")}
    assert counts == {(True, 2), (False, EXAMPLE_ROUND[1])}
    assert [s.count for s in again.spent("8")] == [1] and again.spent("9") == []


DAMAGED = {
    "cut": lambda text: text[:-5],
    "another format": lambda text: text.replace('"format": 1', '"format": 2'),
    "no count": lambda text: text.replace('"count": 3', '"count": 0'),
    "a true count": lambda text: text.replace('"count": 3', '"count": true'),
    "no noise": lambda text: text.replace('"noise_multiplier": 2.0', '"noise_multiplier": 0.0'),
    "another kind": lambda text: text.replace('"whole": true', '"whole": 1'),
    "a list": lambda text: "[]",
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_ledger_is_refused_and_not_begun_anew(what, tmp_path):
    path = tmp_path / "privacy.json"
    mechanism = Mechanism(num_clients=1, sample_share=1.0, noise_multiplier=2.0, sampling="none")
    PrivacyLedger(path).add("7", Spent(mechanism=mechanism, count=3, whole=True))
    text = path.read_text()
    assert PrivacyLedger(path).spent()[0].count == 3
    path.write_text(DAMAGED[what](text))
    assert path.read_text() != text
    with pytest.raises(UserError, match=r"privacy.json' cannot be read: it is damaged.*Remove it"):
        PrivacyLedger(path)


# The rules


def test_the_owners_budget_is_over_all_runs_and_the_runs_over_its_own(tmp_path):
    once, twice = epsilon_after(LOCAL_ROUND), epsilon_after((LOCAL_ROUND[0], 2))
    mine = rules(tmp_path, epsilon=(once + twice) / 2)
    mine.refuse_round(LOCAL, "7", 12)
    mine.spend(LOCAL, "7", 12)
    said = rf"owner allows an epsilon of .* \(privacy.epsilon\), and epsilon {once:.4g} is spent"
    for run in ("7", "8"):
        with pytest.raises(UserError, match=said):
            mine.refuse_round(LOCAL, run, 12)
    assert mine.quotas() == [("privacy.epsilon", pytest.approx(once), (once + twice) / 2)]

    budgeted = LOCAL.with_values({"privacy.epsilon": (once + twice) / 2})
    runs = rules(tmp_path)
    runs.refuse_round(budgeted, "8", 12)
    with pytest.raises(UserError, match=r"privacy.epsilon is .*, and of this client epsilon"):
        runs.refuse_round(budgeted, "7", 12)
    assert runs.quotas() == []


def test_local_noise_covers_each_row_and_row_noise_not_all_of_them(tmp_path):
    with pytest.raises(UserError, match=r"privacy.mode is example, .* allows local only"):
        rules(tmp_path, epsilon=1e6).refuse_round(EXAMPLE, "7", 12)
    both = rules(tmp_path, example_epsilon=1e6)
    for config in (LOCAL, EXAMPLE):
        both.refuse_round(config, "7", 12)
        both.spend(config, "7", 12)
    ((_, spent, _),) = both.quotas()
    assert spent == pytest.approx(epsilon_after(LOCAL_ROUND, EXAMPLE_ROUND))
    ((_, alone, _),) = rules(tmp_path, epsilon=1e6).quotas()
    assert alone == pytest.approx(epsilon_after(LOCAL_ROUND)) and alone < spent


@pytest.mark.parametrize("mode", ["none", "central"])
def test_an_owner_with_a_budget_takes_no_run_without_noise(mode, tmp_path):
    config = Config.of({"privacy.mode": mode})
    rules(tmp_path).refuse_mode(config)
    with pytest.raises(UserError, match=rf"privacy.mode is {mode}, .* allows local only \(priv"):
        rules(tmp_path, epsilon=4.0).refuse_mode(config)
    with pytest.raises(UserError, match="allows local or example only"):
        rules(tmp_path, example_epsilon=4.0).refuse_mode(config)


def test_noise_that_the_server_can_draw_is_refused(tmp_path):
    known = LOCAL.with_values({"privacy.reproducible": True})
    with pytest.raises(UserError, match=r"privacy.reproducible is true .*hides nothing from those"):
        rules(tmp_path).refuse_mode(known)


# The trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


def test_an_upload_is_entered_before_it_leaves_and_the_budget_outlives_the_trainer(data, tmp_path):
    once, twice = epsilon_after(LOCAL_ROUND), epsilon_after((LOCAL_ROUND[0], 2))
    allowed = {"privacy.epsilon": (once + twice) / 2}
    message = train_message(LOCAL, method="basis")
    with resident(data, tmp_path, allowed=allowed) as node:
        first = node.ask(message, LOCAL)
        report = first["report"]
        assert not cause_of(first) and report["withheld"] and report["tokens"] == 0
        assert report["train-loss"] != report["train-loss"]
        assert trained(node.ask(message, LOCAL)) == trained(first)  # from disk: nothing is spent
        assert [s.count for s in node.trainer.privacy.ledger.spent()] == [1]
    with resident(data, tmp_path, allowed=allowed) as node:
        assert trained(node.ask(message, LOCAL)) == trained(first)
        later = node.ask(train_message(LOCAL, method="basis", server_round=2), LOCAL)
        assert "this node's owner allows an epsilon of" in cause_of(later)
        assert f"epsilon {once:.4g} is spent" in cause_of(later)
        plain = node.ask(train_message(PLAIN, method="basis"), PLAIN)
        assert "privacy.mode is none, and this node's owner allows local only" in cause_of(plain)
        met = node.ask(query_message(), PLAIN)
        assert "allows local only" in cause_of(met)  # left out of the run when it is met
        assert not cause_of(node.ask(query_message(), LOCAL))
    held = json.loads((tmp_path / "privacy.json").read_text())["runs"]["7"]
    assert [row["count"] for row in held] == [1]


def test_a_server_whose_job_does_not_fit_its_configuration_gets_nothing(data, tmp_path):
    """It says ``basis`` and sends factors of which lora_A is trained too."""
    with resident(data, tmp_path) as node:
        odd = node.ask(train_message(LOCAL, method="carried"), LOCAL)
        assert "expected lora_B alone: noise covers its change and no other" in cause_of(odd)
        example = node.ask(train_message(EXAMPLE), EXAMPLE)
        assert not cause_of(example) and example["report"]["withheld"]
        assert [(s.whole, s.count) for s in node.trainer.privacy.ledger.spent()] == [
            (False, EXAMPLE_ROUND[1])
        ]


def test_a_node_without_a_trainer_knows_no_budget(data):
    budgeted = LOCAL.with_values({"privacy.epsilon": 5.0})
    node = context_of(budgeted, data_path=str(data), client_id="site")
    refused = asked(train_message(LOCAL, method="basis"), node)
    assert "this node has no resident trainer, which would know what is spent" in cause_of(refused)
    free = context_of(LOCAL, data_path=str(data), client_id="site")
    assert asked(train_message(LOCAL, method="basis"), free)["report"]["withheld"]


def test_an_upload_that_cannot_be_entered_stays_here(data, tmp_path, monkeypatch):
    with resident(data, tmp_path) as node:

        def full(run, spent):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(node.trainer.privacy.ledger, "add", full)
        reply = node.ask(train_message(LOCAL, method="basis"), LOCAL)
        assert "No space left" in cause_of(reply) and not reply.array_records
