"""What the requests of a SuperNode say about it, and a 500 that Flower reads as 503."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flexlora.deploy.request_watch import RequestWatch, idle_pause, watch_requests


class Node:
    """A watch on a clock of its own; ``at(seconds, "Method" or ("Method", error))``."""

    def __init__(self):
        self.now = 0.0
        self.watch = RequestWatch(lambda: self.now)

    def at(self, seconds, *methods, error=False):
        self.now = seconds
        for method in methods:
            self.watch.sent(method)
            self.watch.answered(method, error=error)
        return self

    def trouble(self, seconds):
        self.now = seconds
        return self.watch.trouble()


def active():
    return Node().at(0.0, "ActivateNode", "SendNodeHeartbeat", "PullMessages")


def test_a_node_that_polls_works_and_one_that_has_stopped_does_not():
    node = active()
    for seconds in range(3, 900, 3):
        node.at(float(seconds), "PullMessages", *(["SendNodeHeartbeat"] * (seconds % 18 == 0)))
        assert node.watch.trouble() == ""
    node.at(1100.0, "SendNodeHeartbeat").at(1198.0, "SendNodeHeartbeat")
    assert "sent nothing for 303 s after PullMessages" in node.trouble(1200.0)


def test_a_node_that_trains_for_hours_works_while_its_heart_beats():
    node = active().at(5.0, "PullObject", "ConfirmMessageReceived")
    for seconds in range(20, 20_000, 20):
        assert node.at(float(seconds), "SendNodeHeartbeat").watch.trouble() == ""
    node.at(20_000.0, "PushMessages")  # and its objects never come
    for seconds in range(20_020, 20_300, 20):
        assert node.at(float(seconds), "SendNodeHeartbeat").watch.trouble() == ""
    assert "after PushMessages" in node.trouble(20_310.0)


def test_a_heartbeat_that_has_stopped_is_trouble_although_the_node_polls():
    node = active()
    for seconds in range(3, 119, 3):
        assert node.at(float(seconds), "PullMessages").watch.trouble() == ""
    assert "no heartbeat for 121 s" in node.at(121.0, "PullMessages").watch.trouble()


def test_an_attempt_counts_whether_it_is_answered_or_not():
    """In a network that is cut for an hour Flower goes on trying: a new process would not help."""
    node = active()
    for seconds in range(20, 3600, 20):
        node.now = float(seconds)
        node.watch.sent("PullMessages")
        node.watch.sent("SendNodeHeartbeat")
        assert node.watch.trouble() == ""


def test_errors_for_minutes_are_trouble_and_one_good_answer_ends_them():
    node = active().at(10.0, "PullMessages", error=True)
    node.at(100.0, "PullMessages", error=True).at(101.0, "PullMessages")
    assert node.at(120.0, "SendNodeHeartbeat").trouble(135.0) == ""
    node.at(140.0, "PullMessages", error=True).at(200.0, "SendNodeHeartbeat")
    node.at(262.0, "SendNodeHeartbeat", "PullMessages", error=True)
    assert "answered PullMessages by errors for 122 s" in node.watch.trouble()


def test_an_idle_node_polls_less_often_and_finds_a_message_at_most_a_tenth_late():
    node, poll = active(), "PullMessages"
    polls, now = 0, 0.0
    while now < 3600.0:
        now += 3.0
        node.now = now
        pause = node.watch.pause(poll)
        assert 3.0 + pause == idle_pause(now) and pause <= max(0.0, 0.1 * now)
        now += pause
        polls += 1
        node.at(now, poll, "SendNodeHeartbeat")
    assert polls < 200, "one poll every 3 s would be 1,200"
    node.at(now + 1.0, "PullObject", "ConfirmMessageReceived")
    assert node.watch.pause(poll) == 0.0, "the first poll after work"
    node.at(now + 2.0, poll)
    assert node.watch.pause(poll) == 0.0 and node.watch.pause("PullObject") == 0.0


def test_a_node_asks_a_slow_server_less_often_and_no_more_so_once_it_is_fast_again():
    node, poll = active(), "PullMessages"
    node.watch.sent(poll)
    node.now += 2.0
    node.watch.answered(poll, error=False)
    assert node.watch.pause(poll) == pytest.approx(20.0 - 3.0)
    node.watch.sent(poll)
    node.now += 25.0
    node.watch.answered(poll, error=False)
    assert node.watch.pause(poll) == pytest.approx(30.0 - 3.0), "the longest"
    node.at(node.now, poll)
    assert node.watch.pause(poll) == pytest.approx(idle_pause(node.now) - 3.0)


def test_a_process_that_is_no_supernode_is_judged_by_errors_alone():
    node = Node().at(0.0, "AcquireTask")
    assert node.trouble(10_000.0) == ""
    node.at(10_001.0, "AcquireTask", error=True)
    assert "AcquireTask" in node.trouble(10_122.0)


@pytest.mark.parametrize(("status", "read"), [(200, 200), (500, 503), (503, 503), (401, 401)])
def test_an_error_of_the_server_is_read_as_one_that_passes(status, read):
    class Client:
        def _send(self, context, *, stream=False):
            assert stream
            return SimpleNamespace(status_code=status)

    node = Node()
    watch_requests(Client, node.watch)
    context = SimpleNamespace(rpc_method="/flwr.proto.Fleet/PullMessages")
    assert Client()._send(context, stream=True).status_code == read
    assert bool(node.trouble(121.0)) == (status == 500)
