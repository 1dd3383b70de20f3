"""What the proxy of ``server init`` holds back, with a real nginx before a real SuperLink."""

from __future__ import annotations

import http.client
import os
import shutil
import ssl
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from deployment import SLOWLY, Processes, tail, until
from flexlora.server.init import server_init
from init_folders import free_ports, remove_proxy_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nginx"), reason="no nginx here"),
]
STRANGER_BYTES = int(os.environ.get("FLEXLORA_STRANGER_BYTES", 200 * 2**20))
PIECE = bytes(2**20)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A folder of ``server init``, both of its processes, and their ports."""
    folder = tmp_path_factory.mktemp("proxy")
    place, port = folder / "server", free_ports(2)
    server_init(folder=str(place), host=["localhost"], port=port)
    with Processes(folder) as processes:
        for name, word in (("superlink", "Uvicorn running on"), ("proxy", "start worker process")):
            log = folder / f"{name}.log"
            processes.start([place / "bin" / f"start-{name}"], log, folder / name)
            until(lambda log=log, w=word: w in tail(log, 10**6), SLOWLY, lambda log=log: tail(log))
        yield place, port, processes
        # nginx empties its environment: it is ended by its own number.
        subprocess.run(["kill", (place / "state/nginx/nginx.pid").read_text().strip()])
        remove_proxy_folder(port)


def connection(server, port=None):
    place, proxy_port, _ = server
    trusted = ssl.create_default_context(cafile=str(place / "ca.crt"))
    return http.client.HTTPSConnection("localhost", port or proxy_port, timeout=60, context=trusted)


def post(server, size, *, chunked=False, port=None):
    """The status that a stranger gets for a body of ``size`` zeros; None if it is cut off."""
    to = connection(server, port)
    pieces = (PIECE for _ in range(size // len(PIECE)))
    length = {} if chunked else {"Content-Length": str(size)}
    try:
        headers = {"Content-Type": "application/protobuf", **length}
        to.request("POST", "/v1/fleet/push-object", pieces, headers, encode_chunked=chunked)
        return to.getresponse().status
    except OSError:
        return None
    finally:
        to.close()


def superlink_of(processes):
    (found,) = [p for p in processes.marked() if "flexlora.server.supervise" in p.cmdline()]
    return found


class Peak:
    """The largest resident memory of a process while the block lasts, above what it had."""

    def __init__(self, process):
        self.process, self.grown, self._over = process, 0, threading.Event()
        self._first = process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)

    def _watch(self):
        while not self._over.wait(0.02):
            self.grown = max(self.grown, self.process.memory_info().rss - self._first)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_strangers_large_body_does_not_reach_the_superlink(server, chunked):
    superlink = superlink_of(server[2])
    with Peak(superlink) as peak:
        assert post(server, STRANGER_BYTES, chunked=chunked) in (413, None)
    print(f"grown by {peak.grown / 2**20:.0f} MiB for {STRANGER_BYTES / 2**20:.0f} MiB")
    assert peak.grown < 64 * 2**20
    assert connection_status(server) == 200


def test_past_the_proxy_a_supervised_superlink_holds_no_more_than_its_limit(server):
    """Its growth is seen: some of the 8 MiB that it reads before it refuses."""
    with Peak(superlink_of(server[2])) as peak:
        status = post(server, STRANGER_BYTES, port=server[1] + 1)
    print(f"grown by {peak.grown / 2**20:.0f} MiB for {STRANGER_BYTES / 2**20:.0f} MiB")
    assert status in (413, None)
    assert 4 * 2**20 < peak.grown < 64 * 2**20


def connection_status(server):
    to = connection(server)
    try:
        to.request("GET", "/health")
        return to.getresponse().status
    finally:
        to.close()


def test_an_object_of_flowers_passes(server):
    """A body of 5 MiB and more is Flower's business: it refuses the unsigned request itself."""
    assert post(server, 6 * 2**20) not in (413, 502, 503, None)


def test_fifty_nodes_behind_one_address_pass_at_the_rate(server):
    """Fifty that fetch two objects at once, six times each: 600 requests, as fast as they can."""

    def node(count):
        statuses = Counter()
        to = connection(server)
        for _ in range(count):
            to.request("GET", "/health")
            answer = to.getresponse()
            answer.read()
            statuses[answer.status] += 1
        to.close()
        return statuses

    began = time.monotonic()
    with ThreadPoolExecutor(100) as pool:
        seen = sum(pool.map(node, [6] * 100), Counter())
    assert seen == {200: 600}
    assert time.monotonic() - began > 600 / 100 - 2, "more than the rate waits"


def test_requests_that_do_not_end_are_held_in_a_small_number(server):
    """Of those that announce a body and send none, 128 are let in at once."""
    held = []

    def hold(count):
        for _ in range(count):
            to = connection(server)
            to.connect()
            to.putrequest("POST", "/v1/fleet/push-object")
            to.putheader("Content-Length", "1000")
            to.endheaders()
            held.append(to)

    try:
        hold(120)
        assert connection_status(server) == 200
        hold(10)
        until(lambda: connection_status(server) == 503, 20, lambda: "all were let in")
    finally:
        for to in held:
            to.close()
    until(lambda: connection_status(server) == 200, 10, lambda: "still held")


def test_a_request_that_does_not_go_on_is_cut_off(server):
    """The values, as seconds; nginx's own tests hold what they do."""
    text = (server[0] / "nginx" / "flexlora.conf").read_text()
    for line in ("client_header_timeout     15s;", "client_body_timeout       30s;"):
        assert line in text


def test_the_superlink_is_alive_after_all_of_it(server):
    assert connection_status(server) == 200
    assert superlink_of(server[2]).status() in (psutil.STATUS_SLEEPING, psutil.STATUS_RUNNING)
