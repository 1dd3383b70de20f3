"""The fleet benchmark at three stub nodes over a real SuperLink, and its parts by themselves."""

import asyncio
import socket
import threading
import time

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse

from flexlora.simulations.benchmarks import fleet
from flexlora.simulations.benchmarks.fleet_case import FleetCase
from flexlora.simulations.benchmarks.fleet_connection import FleetConnection, FleetRefused
from flexlora.simulations.benchmarks.fleet_link import SlowLink
from flexlora.simulations.benchmarks.fleet_run import measured

OBJECTS = 3  # of a message: itself, its records, the values with the factors among them


@pytest.mark.slow
def test_three_stub_nodes_take_part_in_a_real_round(tmp_path):
    """Every reply counts, and a node asks for its two messages what a SuperNode asks."""
    # In memory: on a busy machine SQLite may answer that it is locked, which ends a SuperExec.
    case = FleetCase(nodes=3, rounds=1, stored=False, limit_seconds=600.0)
    row = fleet.row_of("3 nodes", case, measured(case, tmp_path))
    assert (row.error, row.stopped, row.refusals, row.retries) == (0.0, "", 0, 0)
    one = {"confirm-message-received": 2.0, "push-messages": 2.0, "get-run": 0.0, "get-fab": 0.0}
    assert {call: row.calls[call] for call in one} == one
    assert row.calls["pull-object"] >= 2 * OBJECTS  # again where the server still uploads it
    assert row.calls["push-object"] >= 2 * OBJECTS
    assert row.calls["pull-messages"] >= 2.0
    assert row.superlink_cpu > 0.0 and row.serverapp_cpu > 0.0
    assert min(row.superlink_megabytes, row.serverapp_megabytes) > 50.0


def found(**changes):
    made = {
        "rounds": 2,
        "ok": [4, 4],
        "round_seconds": [10.0, 14.0],
        "median_seconds": 12.0,
        "cpu": {"superlink": 3.0, "serverapp": 1.0},
        "peaks": {"superlink": 1e8, "serverapp": 1e8},
        "database_bytes": 0,
        "retries": 0,
        "refusals": 0,
    }
    return made | changes


def test_a_row_is_met_only_if_it_is_fast_and_every_reply_counted():
    case = FleetCase(nodes=4, rounds=2)
    assert fleet.row_of("x", case, found()).met
    assert not fleet.row_of("x", case, found(median_seconds=121.0)).met
    assert not fleet.row_of("x", case, found(ok=[4, 3])).met


def test_real_nodes_are_measured_beyond_their_training():
    case = FleetCase(nodes=4, rounds=2, real=True)
    row = fleet.row_of("x", case, found(train_seconds=[4.0, 9.0]))
    assert row.seconds == 5.5 and row.ratio == 5.5 / fleet.REAL_SECONDS


def test_a_run_that_closed_no_round_takes_at_least_as_much_a_node_as_a_smaller_one():
    smaller = fleet.row_of("x", FleetCase(nodes=4, rounds=2), found())
    nothing = {"rounds": 0, "ok": [], "stopped": "too slow"}
    lost = {k: v for k, v in found(**nothing).items() if k not in ("median_seconds", "cpu")}
    row = fleet.row_of("x", FleetCase(nodes=40, rounds=2), lost, smaller)
    assert row.extrapolated and (row.seconds, row.superlink_cpu) == (120.0, 30.0)
    assert row.error == 1.0 and not row.met


@pytest.fixture
def answers():
    """A server of loopback that answers each request by the next of a list of statuses."""
    statuses, ended = [], threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while not ended.is_set():
            connection, _ = listener.accept()
            with connection:
                while statuses and connection.recv(65536):
                    status, body = statuses.pop(0)
                    if not status:
                        break  # the connection is reset
                    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n"
                    connection.sendall(head.encode() + body)

    threading.Thread(target=serve, daemon=True).start()
    yield statuses, f"127.0.0.1:{listener.getsockname()[1]}"
    ended.set()
    listener.close()


def activated(address):
    async def ask():
        connection = FleetConnection(address, ec.generate_private_key(ec.SECP384R1()))
        try:
            return await connection.ask(ActivateNodeRequest()), connection
        finally:
            connection.close()

    return asyncio.run(ask())


def test_what_flower_retries_is_retried_and_counted(answers):
    statuses, address = answers
    there = ActivateNodeResponse(node_id=7).SerializeToString()
    statuses += [(503, b""), (0, b""), (200, there)]
    response, connection = activated(address)
    assert response.node_id == 7 and connection.retries == 2
    assert connection.requests == {"activate-node": 3}


def test_what_ends_a_supernode_is_raised(answers):
    statuses, address = answers
    statuses += [(500, b"database is locked")]
    with pytest.raises(FleetRefused, match="activate-node: HTTP 500, database is locked"):
        activated(address)


def test_a_slow_link_delays_both_ways_and_shares_its_rate():
    """Two connections of one node: all bytes arrive as they were, no sooner than the line lets."""
    sent, rate, delay = bytes(range(256)) * 100, 100_000.0, 0.05
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo():
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    left = len(sent)
                    while left:
                        chunk = connection.recv(65536)
                        left -= len(chunk)
                        connection.sendall(chunk)

        threading.Thread(target=echo, daemon=True).start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with SlowLink(address, delay, rate) as link:
            host, _, port = link.address.rpartition(":")
            began = time.monotonic()
            ends = [socket.create_connection((host, int(port))) for _ in range(2)]
            for end in ends:
                end.sendall(sent)
            for end in ends:
                with end:
                    came = b""
                    while len(came) < len(sent):
                        came += end.recv(65536)
                assert came == sent
            # Up: both messages share the rate. Down: the last chunk has to follow the others.
            assert time.monotonic() - began >= 2 * len(sent) / rate + 2 * delay
            assert (link.bytes_up, link.bytes_down) == (2 * len(sent), 2 * len(sent))
