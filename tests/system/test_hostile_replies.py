"""Nodes that upload what is no reply, over a real SuperLink: the run is the one without them.

The SuperLink is a process, the server's strategy runs here over Flower's own HTTP grid, and the
nodes speak Flower's fleet API with a key each. Nobody trains.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading

import pytest
from flwr.app import Array, ArrayRecord, MessageType
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_object_id

from faulty_grid import FaultyGrid, lost, settings
from federation import same_bytes
from flexlora.runs.outcomes import Outcome
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.benchmarks.fleet_node import StubNode
from flexlora.simulations.benchmarks.fleet_running import RunningFleet
from flexlora.wire.packing import DATA, PACKED
from in_place_of_superexec import server_app_grid
from real_superlink import real_superlink

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_proxy")]


class Honest(StubNode):
    """Answers at once, with what ``FaultyGrid`` answers for the client of this name."""

    def __init__(self, address, name, replies):
        super().__init__(address, name=name, poll_seconds=0.2)
        self.replies = replies

    def answer(self, message):
        self.replies.clients[message.metadata.dst_node_id] = self.name
        content = self.replies.answer(message).content
        return self.lie(content) if message.metadata.message_type == MessageType.TRAIN else content

    def lie(self, content):
        return content


class Junk(Honest):
    """A message object with a valid hash whose body is no protobuf."""

    training = False

    def lie(self, content):
        self.training = True
        return content

    def objects(self, reply):
        if not self.training:
            return super().objects(reply)
        self.training = False
        part = b"Message  64\0" + b"\xff" * 64
        name = get_object_id(part)
        reply.metadata.__dict__["_message_id"] = name
        return ObjectTree(object_id=name), {name: part}


class Huge(Honest):
    """An array of 2**62 rows and no bytes."""

    def lie(self, content):
        array = Array("uint8", (2**62, 4, 0), "flexlora.raw", b"")
        del content["report"][DATA]
        content[PACKED] = ArrayRecord({PACKED: array})
        return content


class HugeInside(Honest):
    """2**62 rows in the index."""

    def lie(self, content):
        content["report"][f"{PACKED}/rows"] = [2**62] * len(content["report"][f"{PACKED}/rows"])
        return content


class Heavy(Honest):
    """30 MB where some kilobytes are expected."""

    def lie(self, content):
        data = os.urandom(30 * 10**6)
        array = Array("uint8", (len(data),), "flexlora.raw", data)
        del content["report"][DATA]
        content[PACKED] = ArrayRecord({PACKED: array})
        return content


class Slow(Honest):
    """Announces its reply and uploads its factors when all others have been heard."""

    def __init__(self, address, name, replies, released):
        super().__init__(address, name, replies)
        ask = self.connection.ask

        async def late(request):
            if isinstance(request, PushObjectRequest) and DATA.encode() in request.object_content:
                while not released.is_set():
                    await asyncio.sleep(0.05)
            return await ask(request)

        self.connection.ask = late


LIARS = {"junk": Junk, "huge": Huge, "huge-inside": HugeInside, "heavy": Heavy}
CAUSES = {
    "junk": "unreadable reply: ",
    "huge": "of shape [4611686018427387904, 4, 0], expected flexlora.raw/uint8 of shape [0]",
    "huge-inside": "bytes, the index is for",
    "heavy": "bytes or more, expected at most",
}
HONEST = ("a", "b", "slow")


class Rows:
    """Notes every client's outcome."""

    def __init__(self):
        self.rows = {}

    def replied(self, client_id, outcome, cause, late):
        self.rows[client_id] = (outcome, cause)

    def __getattr__(self, event):
        if event.startswith("_"):
            raise AttributeError(event)
        return lambda *args: None


class Releasing(FlexLoRAStrategy):
    """Notes whose replies come, and lets the slow node go on when all others have come."""

    def aggregate_train(self, server_round, replies):
        self.heard = []

        def noted():
            for reply in replies:
                self.heard.append(reply.metadata.src_node_id)
                if len(self.heard) == len(LIARS) + len(HONEST) - 1:
                    self.released.set()
                yield reply

        return super().aggregate_train(server_round, noted())


def config():
    return settings(
        num_server_rounds=1,
        server__min_nodes=len(LIARS) + len(HONEST),
        server__round_timeout_seconds=300.0,
        server__wait_seconds=300.0,
        eval__every=0,
    )


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """The strategy, the outcomes and the log of a run with liars."""
    folder, released = tmp_path_factory.mktemp("superlink"), threading.Event()
    replies, rows = FaultyGrid({}), Rows()
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("flexlora").addHandler(handler)
    with (
        real_superlink(folder, "--insecure", "--isolation", "process") as (port, environment),
        server_app_grid(folder, port, environment) as grid,
    ):
        where = f"127.0.0.1:{port}"
        nodes = [kind(where, name, replies) for name, kind in LIARS.items()]
        nodes += [Honest(where, name, replies) for name in HONEST[:2]]
        nodes += [Slow(where, "slow", replies, released)]
        with RunningFleet(nodes) as fleet:
            fleet.entered(120.0)
            strategy = Releasing(config(), observer=rows)
            strategy.released = released
            strategy.start(grid)
            ids = {node.name: node.node.node_id for node in nodes}
    logging.getLogger("flexlora").removeHandler(handler)
    return strategy, rows.rows, records, ids


@pytest.mark.parametrize("liar", LIARS)
def test_what_a_liar_uploads_is_its_own_failed_row(attacked, liar):
    _, rows, records, ids = attacked
    outcome, cause = rows[liar]
    assert outcome is Outcome.FAILED and CAUSES[liar] in cause
    if liar in ("junk", "heavy"):
        assert any(f"node {ids[liar]}: " in record for record in records), records


def test_the_others_count_and_a_slow_upload_holds_up_nobody(attacked):
    strategy, rows, _, ids = attacked
    assert {rows[name][0] for name in HONEST} == {Outcome.OK}, rows
    assert strategy.heard[-1] == ids["slow"] and len(strategy.heard) == len(ids)


def test_the_sum_is_that_of_a_round_in_which_the_liars_failed(attacked):
    strategy = attacked[0]
    names = [*LIARS, *HONEST]
    failing = {(1, name): [lost(1)] for name in LIARS}
    grid = FaultyGrid(dict(enumerate(names, start=1)), failing)
    without = FlexLoRAStrategy(config())
    without.start(grid)
    assert same_bytes(strategy.state, without.state)
    everybody = FlexLoRAStrategy(config())
    everybody.start(FaultyGrid(dict(enumerate(names, start=1))))
    assert not same_bytes(strategy.state, everybody.state)
