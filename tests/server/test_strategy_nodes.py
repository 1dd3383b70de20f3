"""Nodes come and go: a participant is known by its id, never by address or time of arrival."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from federation import (
    TamperingGrid,
    client_rows,
    federation,
    rounds,
    same_bytes,
    small,
    untimed,
)
from flexlora.clients.messages import encode_capability
from flexlora.errors import UserError

VICTIM = "client_01"


class NodesGrid(TamperingGrid):
    """Nodes under other ids, replies out of order, and one kind of message tampered with."""

    def __init__(self, worker, *, node_ids=None, slowness=None, kind=None, tamper=None):
        super().__init__(worker)
        if node_ids:
            self._clients = dict(zip(node_ids, worker.client_ids, strict=True))
        self.slowness = dict(slowness or {})  # client id: polls until its reply is there
        self.kind, self.tamper = kind, tamper
        self.asked, self.arrived = [], []

    def push_messages(self, messages):
        messages = list(messages)
        self.asked += [(m.metadata.message_type, self._client(m)) for m in messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        ready = []
        for message_id in message_ids:
            message = self.sent[message_id]
            client_id = self._client(message)
            trains = message.metadata.message_type == MessageType.TRAIN
            if trains and self.slowness.get(client_id, 0) > 0:
                self.slowness[client_id] -= 1
            else:
                ready.append(message_id)
        return super().pull_messages(ready)

    def _on_the_way(self, message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            self.arrived.append(self._client(message))
        if message.metadata.message_type == self.kind and self._client(message) == VICTIM:
            return self.tamper(reply, message)
        return super()._on_the_way(message, reply)


def run_with(worker, folder, **options):
    config = options.pop("config", small())
    grid = NodesGrid(worker, **options)
    strategy, run = federation(grid, config, folder)
    return strategy, run, grid


def test_node_ids_that_flower_draws_anew_change_nothing(worker, tmp_path):
    config = small(fraction_train=0.5, num_server_rounds=2, eval__fraction=0.5)
    first, run, _ = run_with(worker, tmp_path / "a", config=config)
    second, again, grid = run_with(
        worker, tmp_path / "b", config=config, node_ids=[4096, 17, 991, 3]
    )
    assert same_bytes(first.state, second.state)
    assert untimed(client_rows(run.path)) == untimed(client_rows(again.path))
    assert [row.get("eval_loss") for row in rounds(run.path)] == [
        row.get("eval_loss") for row in rounds(again.path)
    ]
    trained = {name for kind, name in grid.asked if kind == MessageType.TRAIN}
    assert 2 <= len(trained) < 5


def test_the_order_of_arrival_changes_nothing(worker, tmp_path):
    first, run, prompt = run_with(worker, tmp_path / "a")
    slow = {"client_00": 3, "client_02": 2, "client_01": 1}
    second, again, slower = run_with(worker, tmp_path / "b", slowness=slow)
    assert prompt.arrived == worker.client_ids
    assert slower.arrived == ["client_03", "client_01", "client_02", "client_00"]
    assert same_bytes(first.state, second.state)
    assert untimed(client_rows(run.path)) == untimed(client_rows(again.path))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"fingerprint": "0" * 32}, "another base model"),
        ({"version": "3.0.1"}, "FlexLoRA 3.0.1, the server has"),
        ({"modules": ("lm_head",), "out_features": (4,), "in_features": (4,)}, "other targets"),
        ({"cause": "OSError: no disk"}, "OSError: no disk"),
    ],
)
def test_a_node_that_does_not_fit_is_left_out_with_its_cause(change, cause, worker, tmp_path):
    def odd(reply, message):
        capability = replace(worker.capability(VICTIM), **change)
        return [Message(encode_capability(capability), reply_to=message)]

    strategy, run, grid = run_with(worker, tmp_path / "run", kind=MessageType.QUERY, tamper=odd)
    assert VICTIM not in strategy.roster.members and len(strategy.roster.members) == 3
    (row,) = [row for row in client_rows(run.path) if row["status"] == "left out"]
    assert row["client_id"] == VICTIM and cause in row["cause"]
    assert (MessageType.TRAIN, VICTIM) not in grid.asked
    assert rounds(run.path)[1]["clients_ok"] == 3


def capability_records(**values):
    return RecordDict({"capability": ConfigRecord(values)})


NONSENSE = {
    "nothing": lambda honest: RecordDict(),
    "no client id": lambda honest: capability_records(version="1"),
    "a number for an id": lambda honest: capability_records(**{**honest, "client-id": 7}),
    "lists of unequal length": lambda honest: capability_records(**{**honest, "in-features": [4]}),
    "text for examples": lambda honest: capability_records(**{**honest, "num-examples": "many"}),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_capability_report_that_is_nonsense_leaves_out_that_node_alone(kind, worker, tmp_path):
    def odd(reply, message):
        honest = dict(reply.content["capability"])
        return [Message(NONSENSE[kind](honest), reply_to=message)]

    strategy, run, _ = run_with(worker, tmp_path / "run", kind=MessageType.QUERY, tamper=odd)
    assert sorted(strategy.roster.members) == ["client_00", "client_02", "client_03"]
    assert len([row for row in client_rows(run.path) if row["status"] == "left out"]) == 1
    assert rounds(run.path)[1]["clients_ok"] == 3


@pytest.mark.parametrize("silent", [True, False])
def test_a_node_that_does_not_answer_the_query_is_counted_as_left_out(silent, worker, tmp_path):
    def lost(reply, message):
        return [] if silent else [Message(Error(code=8, reason="crashed"), reply_to=message)]

    config = small(server__round_timeout_seconds=0.3)
    strategy, run, _ = run_with(
        worker, tmp_path / "run", config=config, kind=MessageType.QUERY, tamper=lost
    )
    assert len(strategy.roster.members) == 3
    (row,) = [row for row in client_rows(run.path) if row["status"] == "left out"]
    assert row["cause"]


def test_a_client_that_two_nodes_claim_trains_once(worker, tmp_path):
    def impostor(reply, message):
        return [Message(encode_capability(worker.capability("client_02")), reply_to=message)]

    strategy, _, grid = run_with(worker, tmp_path / "run", kind=MessageType.QUERY, tamper=impostor)
    assert sorted(strategy.roster.members) == ["client_00", "client_02", "client_03"]
    (cause,) = strategy.roster.left_out.values()
    assert "is this client already" in cause
    assert [kind for kind, _ in grid.asked].count(MessageType.TRAIN) == 3


def test_too_few_nodes_is_told_with_both_numbers(worker, tmp_path):
    config = small(server__min_nodes=9, server__wait_seconds=0.1)
    with pytest.raises(UserError, match=r"4 nodes are connected after 0\.1 s, expected 9"):
        federation(NodesGrid(worker), config, tmp_path / "run")


def with_scores(message, honest, **columns):
    """An honest reply with other lists of scores."""
    report = {**honest["report"], **{f"score/{name}": held for name, held in columns.items()}}
    return Message(RecordDict({"report": ConfigRecord(report)}), reply_to=message)


SCORES = {
    "an error": lambda message, honest: Message(Error(code=5, reason="gone"), reply_to=message),
    "nothing": lambda message, honest: Message(RecordDict(), reply_to=message),
    "text for losses": lambda message, honest: with_scores(message, honest, loss=["low", "low"]),
    "fewer losses than classes": lambda message, honest: with_scores(message, honest, loss=[1.0]),
    "one number for losses": lambda message, honest: with_scores(message, honest, loss=1.0),
    "another client's name": lambda message, honest: Message(
        RecordDict({**honest, "report": ConfigRecord({"client-id": "client_02", "cause": ""})}),
        reply_to=message,
    ),
}


@pytest.mark.parametrize("kind", SCORES)
def test_scores_that_make_no_sense_count_for_nobody(kind, worker, tmp_path):
    """The means are those over the other three clients, and the run goes on."""

    def without(reply, message):
        return []

    def odd(reply, message):
        return [SCORES[kind](message, dict(reply.content))]

    config = small(server__round_timeout_seconds=0.3)
    query = {"config": config, "kind": MessageType.EVALUATE}
    first, run, _ = run_with(worker, tmp_path / "a", tamper=without, **query)
    second, again, _ = run_with(worker, tmp_path / "b", tamper=odd, **query)
    assert same_bytes(first.state, second.state)
    for expected, got in zip(rounds(run.path)[1:], rounds(again.path)[1:], strict=True):
        losses = {key: value for key, value in expected.items() if key.startswith("eval_loss")}
        assert losses and losses == {key: got.get(key) for key in losses}


def test_a_node_of_an_earlier_version_sends_fewer_sums_and_is_scored(worker, tmp_path):
    """The sums for bits per byte and choices are newer than the wire's format: none means zero."""
    newer = ("answer_bytes", "choice_rows", "correct", "correct_norm", "pattern_rows", "passed")

    def older(reply, message):
        report = {
            key: value
            for key, value in reply.content["report"].items()
            if key.removeprefix("score/").replace("-", "_") not in newer
        }
        return [Message(RecordDict({"report": ConfigRecord(report)}), reply_to=message)]

    query = {"config": small(), "kind": MessageType.EVALUATE}
    _, run, _ = run_with(worker, tmp_path / "a")
    _, again, _ = run_with(worker, tmp_path / "b", tamper=older, **query)
    for expected, got in zip(rounds(run.path), rounds(again.path), strict=True):
        assert expected["eval_loss"] == pytest.approx(got["eval_loss"], rel=1e-6)
        bits, rest = expected["eval_bits_per_byte"], got["eval_bits_per_byte"]
        assert 0 < bits < rest, "the control: one client's bytes are missing from the sum"


def test_the_sum_weighs_clients_by_their_examples(worker, tmp_path):
    """Negative control for the bytes above: with other weights it is another sum."""
    first, _, _ = run_with(worker, tmp_path / "a")

    def heavier(reply, message):
        reply.content["report"]["num-examples"] *= 5
        return [reply]

    second, _, _ = run_with(worker, tmp_path / "b", kind=MessageType.TRAIN, tamper=heavier)
    name = next(iter(first.state.change))
    gap = (first.state.change[name].to_dense() - second.state.change[name].to_dense()).norm()
    assert gap > 1e-3 * torch.linalg.norm(first.state.change[name].to_dense())
