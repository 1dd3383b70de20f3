"""A SuperLink that is away is asked again, one that is busy gets smaller requests."""

from __future__ import annotations

import logging

import httpx
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.run import RunNotRunningException

from faulty_grid import FaultyGrid, people
from flexlora.server.transport.exchange import exchange
from flexlora.server.transport.link import Unreachable, link_of
from flexlora.server.transport.retry_queue import PendingMessage
from superlink_store import content, exchanged_with, messages, patient_grid, status, taken


@pytest.fixture
def grid(monkeypatch):
    return patient_grid(monkeypatch)


OUTAGES = {
    "a 500": status(500),
    "a 503": status(503),
    "too many requests": status(429),
    "a reset": httpx.ReadError("reset by peer"),
    "nobody listens": httpx.ConnectError("connection refused"),
    "a timeout": httpx.ReadTimeout("timed out"),
    "half an answer": httpx.RemoteProtocolError("peer closed"),
    "an answer that is none": ValueError("Invalid protobuf response payload"),
}


@pytest.mark.parametrize("what", OUTAGES)
def test_an_outage_anywhere_in_a_round_is_waited_for_and_logged_once(what, grid, caplog):
    """In the push, in polls, between the objects of a reply and at its confirmation."""
    pending = messages(3)
    for p in pending:
        grid.store.reply(p.message, content())
    grid.store.failures = [OUTAGES[what]] * 3 + [None, OUTAGES[what], OUTAGES[what], None, None]
    grid.store.failures += [OUTAGES[what], OUTAGES[what]]
    with caplog.at_level(logging.WARNING):
        got = exchanged_with(grid, pending)
    assert sorted(p.node_id for p, reply in got if not reply.has_error()) == [10, 11, 12]
    assert caplog.text.count("does not answer, and is asked again") == 3
    assert caplog.text.count("answers again after") == 3
    assert grid._client._retry_invoker.max_tries is None  # others have Flower's way again


def test_an_outage_to_the_end_of_the_round_is_silence_and_no_exception(grid):
    pending = messages(2)
    grid.store.failures = [status(500)] * 10_000
    got = exchanged_with(grid, pending, timeout=120.0)
    assert [reply for _, reply in got] == [None, None] and grid.clock.now() <= 125.0
    assert len(grid.store.calls) < 40  # at growing pauses


def test_our_own_fault_and_the_end_of_the_run_are_raised(grid):
    for failure, kind in ((status(404), httpx.HTTPStatusError), (KeyError("x"), KeyError)):
        grid.store.failures = [failure]
        with pytest.raises(kind):
            taken(grid, messages(1))
    grid.store.failures = [RunNotRunningException()]
    with pytest.raises(RunNotRunningException):
        taken(grid, messages(1))


def test_a_push_that_is_repeated_has_the_same_ids_and_stores_each_message_once(grid):
    """Flower's own push over the store: 300 messages that share a payload of 3 MB."""
    shared = content(3 * 2**20)
    batch = [
        Message(shared, dst_node_id=node, message_type="train", group_id="1") for node in range(300)
    ]
    grid.store.failures = [None, status(500)]  # the first request is stored, its upload fails
    ids, _ = link_of(grid).push(batch, 60.0)
    assert len(set(ids)) == 300 == len(grid.store.pushed) and set(ids) == set(grid.store.pushed)
    assert grid.store.calls.count("push") == 31  # thirty batches, one of them twice
    uploads = sum(len(part) for part in grid.store.objects.values())
    assert uploads < 3 * 2**20 + 300 * 2000 and grid.store.push_bytes < 100 * 1500


def test_two_messages_of_a_class_differ_in_the_message_object_alone():
    shared = content(100)
    one, two = (Message(shared, dst_node_id=node, message_type="train") for node in (1, 2))
    first, second = (get_all_nested_objects(message) for message in (one, two))
    assert set(first) ^ set(second) == {one.object_id, two.object_id} and len(first) == 6


def test_nodes_are_asked_for_until_the_superlink_is_back(grid):
    grid.store.nodes, grid.store.failures = [4, 5], [status(500)] * 3
    assert link_of(grid).node_ids(grid.clock.now() + 30.0) == {4, 5}
    grid.store.failures = [status(500)] * 100
    with pytest.raises(Unreachable):
        link_of(grid).node_ids(grid.clock.now() + 5.0)


def letters(grid):
    return [
        PendingMessage(Message(RecordDict(), dst_node_id=node, message_type="query"))
        for node in grid.clients
    ]


class Short(FaultyGrid):
    """A SuperLink that takes so many messages at a time, as one that finds more too large."""

    most, requests = 1, 0

    def push_messages(self, messages):
        self.requests += 1
        return [] if len(list(messages)) > self.most else super().push_messages(messages)


def test_messages_that_are_too_large_together_go_in_smaller_requests():
    grid = Short(people(5))
    got = list(exchange(grid, letters(grid), timeout=5.0))
    assert sorted(p.node_id for p, reply in got if reply) == sorted(grid.clients)
    assert [sent[4] for sent in grid.pushed] == sorted(grid.clients) and grid.requests == 9


def test_a_message_that_is_too_large_by_itself_is_told():
    grid = Short(people(2))
    grid.most = 0
    with pytest.raises(ValueError, match=r"took 0 of 2 messages.*lower the ranks or raise"):
        list(exchange(grid, letters(grid), timeout=5.0))
