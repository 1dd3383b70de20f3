"""The resident trainer over a real Unix socket: the bytes of the in-process path, and kept ones."""

from __future__ import annotations

import pytest

from federation import adapter_bytes, federation
from flexlora.clients.worker import Worker
from flexlora.wire.jobs import PERSONAL
from packed import scores, trained
from trainers import (
    NodesGrid,
    asked,
    context_of,
    evaluate_message,
    query_message,
    resident,
    run_config,
    train_message,
    values_of,
    write_rows,
)

MEASURED = ("train-seconds", "free-bytes")  # by a clock, by what other programs leave


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


@pytest.fixture(scope="module")
def trainer(data, tmp_path_factory):
    with resident(data, tmp_path_factory.mktemp("kept")) as made:
        yield made


def messages(config):
    return {
        "query": query_message(),
        "train": train_message(config),
        "aligned": train_message(config, method="aligned", rank=4),
        "evaluate": evaluate_message(config),
    }


@pytest.mark.parametrize("kind", ["query", "train", "aligned", "evaluate"])
def test_the_reply_is_that_of_a_clientapp_that_works_in_its_own_process(trainer, data, kind):
    config = run_config(train__max_steps=3)
    through = trainer.ask(messages(config)[kind], config)
    here = asked(messages(config)[kind], context_of(config, data_path=str(data), client_id="site"))
    first, second = (values_of(content, without=MEASURED) for content in (through, here))
    assert first == second and len(first) > 5
    record = "capability" if kind == "query" else "report"
    assert through[record]["cause"] == "" and through[record]["client-id"] == "site"


def test_another_seed_gives_other_bytes(trainer):
    """What the test above compares can differ at all."""
    replies = [
        trainer.ask(train_message(config), config) for config in (run_config(), run_config(seed=1))
    ]
    first, second = (values_of(content, without=MEASURED) for content in replies)
    assert first.keys() == second.keys() and first != second


def test_a_federation_of_a_trainer_and_a_plain_node_is_one_of_two_plain_nodes(data, tmp_path):
    config = run_config(num_server_rounds=2, min_train_clients=2)
    plain = [
        {"data_path": str(data), "client_id": "north"},
        {"data_path": str(write_rows(tmp_path / "south", client=1)), "client_id": "south"},
    ]
    with resident(data, tmp_path / "kept", client_id="north") as made:
        mixed = [{"trainer_socket": str(made.path)}, plain[1]]
        federation(NodesGrid(config, mixed), config, tmp_path / "mixed")
        assert made.trainer.totals.trained == 2
    federation(NodesGrid(config, plain), config, tmp_path / "plain")
    assert adapter_bytes(tmp_path / "mixed") == adapter_bytes(tmp_path / "plain")


def test_factors_of_ones_own_stay_on_the_nodes_disk_and_go_on(data, tmp_path):
    """Round 2 goes on from what round 1 kept, over a restart; no reply holds any of it."""
    config = run_config(personal__rank=2, personal__max_steps=2, eval__max_examples=4)
    with resident(data, tmp_path / "kept") as made:
        assert PERSONAL not in scores(made.ask(evaluate_message(config), config))
        first = made.ask(train_message(config), config)
    with resident(data, tmp_path / "kept") as made:
        one = made.ask(evaluate_message(config), config)
        made.ask(train_message(config, server_round=2), config)
        two = made.ask(evaluate_message(config, server_round=2), config)
    plain = run_config(eval__max_examples=4)
    here = asked(train_message(plain), context_of(plain, data_path=str(data), client_id="site"))
    assert values_of(first, without=MEASURED) == values_of(here, without=MEASURED)
    one, two = (scores(content)[PERSONAL] for content in (one, two))
    assert one.loss != two.loss and one.tokens > 0
    files = sorted(path.name for path in (tmp_path / "kept" / "personal").rglob("*.safetensors"))
    assert files == ["round-000001.safetensors", "round-000002.safetensors"]


@pytest.mark.parametrize("message_of", [train_message, evaluate_message])
def test_a_repeated_request_is_answered_from_disk_with_the_same_bytes(
    data, tmp_path, monkeypatch, message_of
):
    config = run_config()
    with resident(data, tmp_path / "kept") as made:
        first = made.ask(message_of(config), config)
        for work in ("train", "evaluate"):
            monkeypatch.setattr(Worker, work, _forbidden)
        again = made.ask(message_of(config), config)
        renumbered = made.ask(message_of(config), config, node_id=6)
        assert made.trainer.totals.from_disk == 2
    with resident(data, tmp_path / "kept") as restarted:
        after = restarted.ask(message_of(config), config)
        assert restarted.trainer.totals.from_disk == 1
    assert values_of(first)["report/cause"] == ""
    assert values_of(first) == values_of(again) == values_of(renumbered) == values_of(after)


def _forbidden(self, jobs):
    raise AssertionError("this was answered before")


@pytest.mark.parametrize("change", ["run", "round", "payload", "settings", "client", "rows"])
def test_a_request_that_differs_in_anything_is_not_answered_from_disk(tmp_path, change):
    config, rows = run_config(), write_rows(tmp_path / "data")
    with resident(rows, tmp_path / "kept") as made:
        made.ask(train_message(config), config)
        if change == "rows":
            write_rows(tmp_path / "data", rows=11)
        made.ask(
            train_message(
                config,
                server_round=2 if change == "round" else 1,
                rank=4 if change == "payload" else 2,
            ),
            run_config(seed=9) if change == "settings" else config,
            run_id=8 if change == "run" else 7,
            client_id="other" if change == "client" else "site",
        )
        assert (made.trainer.totals.trained, made.trainer.totals.from_disk) == (2, 0)


def test_a_failure_is_told_and_not_kept(data, tmp_path, monkeypatch):
    config = run_config()

    def fail(self, jobs, rows_per_pass):
        raise RuntimeError("the card fell out")

    with resident(data, tmp_path / "kept") as made:
        with monkeypatch.context() as broken:
            broken.setattr(Worker, "_train", fail)
            reply = made.ask(train_message(config), config)
        assert reply["report"]["cause"] == "RuntimeError: the card fell out"
        assert not trained(reply)
        assert made.ask(train_message(config), config)["report"]["cause"] == ""
        assert made.trainer.totals.trained == 1
