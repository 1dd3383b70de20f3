"""Messages of several runs meet in one trainer: each gets its own run's reply, and no other's.

The rows, the base, the round and every byte of the payload are the same here. Only the run differs:
the answer to one run must never go to another, whatever the order, and over a restart.
"""

from __future__ import annotations

import itertools

import pytest
from flwr.app import MessageType

from flexlora.clients.trainer.client import call_of
from flexlora.clients.worker import Worker
from flexlora.wire.jobs import PERSONAL
from packed import scores
from trainers import (
    context_of,
    evaluate_message,
    resident,
    run_config,
    train_message,
    values_of,
    write_rows,
)

OLD, NEW = 1, 11  # as text, the one begins the other
MEASURED = ("train-seconds", "free-bytes")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


@pytest.fixture
def numbered(monkeypatch):
    """Trainings that say in their reply how many came before them in this process."""
    honest, count = Worker.train, itertools.count(1)

    def train(self, jobs):
        results = honest(self, jobs)
        for result in results:
            object.__setattr__(result, "num_examples", next(count))
        return results

    monkeypatch.setattr(Worker, "train", train)


def trained(made, config, run_id, **message):
    content = made.ask(train_message(config, **message), config, run_id=run_id)
    assert content["report"]["cause"] == ""
    return content["report"]["num-examples"], values_of(content)


def test_a_run_never_gets_the_reply_of_another(data, tmp_path, numbered):
    """Its own again, however often and however late it asks, while the other goes on."""
    config = run_config()
    with resident(data, tmp_path / "kept") as made:
        old, old_bytes = trained(made, config, OLD)
        new, new_bytes = trained(made, config, NEW)
        assert (old, new) == (1, 2), "the second run was given what the first was told"
        assert trained(made, config, NEW, server_round=2)[0] == 3
        assert trained(made, config, OLD) == (1, old_bytes), "a late message of the older run"
        assert trained(made, config, NEW) == (2, new_bytes)
        assert (made.trainer.totals.trained, made.trainer.totals.from_disk) == (3, 2)
    with resident(data, tmp_path / "kept") as made:
        assert trained(made, config, NEW) == (2, new_bytes)
        assert trained(made, config, OLD) == (1, old_bytes)
        assert trained(made, config, 2)[0] == 4
        assert (made.trainer.totals.trained, made.trainer.totals.from_disk) == (1, 2)


def test_nor_scores_of_another(data, tmp_path):
    config = run_config()
    with resident(data, tmp_path / "kept") as made:
        for run_id in (OLD, NEW, OLD):
            made.ask(evaluate_message(config), config, run_id=run_id)
        assert (made.trainer.totals.evaluated, made.trainer.totals.from_disk) == (2, 1)


def test_nor_factors_that_the_client_keeps_to_itself(data, tmp_path):
    """A run's first round begins anew, though an older one has left own factors for its round 1."""
    config = run_config(personal__rank=2, personal__max_steps=2, eval__max_examples=4)
    with resident(data, tmp_path / "kept") as made:
        made.ask(train_message(config), config, run_id=OLD)
        assert PERSONAL not in scores(made.ask(evaluate_message(config), config, run_id=NEW))
        made.ask(train_message(config, server_round=2), config, run_id=NEW)
        late = made.ask(evaluate_message(config), config, run_id=OLD)
        fresh = made.ask(evaluate_message(config, server_round=2), config, run_id=NEW)
    assert all(scores(content)[PERSONAL].tokens > 0 for content in (late, fresh))
    folders = sorted(path.name for path in (tmp_path / "kept" / "personal").glob("run-*"))
    assert folders == [f"run-{OLD}", f"run-{NEW}"]


def test_no_two_requests_share_a_name(data, tmp_path):
    """Run, round and kind, among them numbers that read alike when they are put side by side."""
    config = run_config()
    with resident(data, tmp_path / "kept") as made:
        names = {
            made.trainer._file_name(
                kind,
                call_of(
                    train_message(config, server_round=server_round),
                    context_of(config, run_id=run_id),
                ),
                "site",
            )
            for kind in (MessageType.TRAIN, MessageType.EVALUATE)
            for run_id in (OLD, NEW, 111, 2**63 + 1)
            for server_round in (1, 11, 111)
        }
    assert len(names) == 2 * 4 * 3
