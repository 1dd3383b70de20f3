"""One Prometheus endpoint for a federation, also between its runs, on ``server.metrics-port``.

The ServerApp's own endpoint lives as long as its process. It is given a free port of the loopback;
this endpoint passes on what it says, keeps its last answer when it is gone, and adds the
follower's own metrics. ``templates/prometheus-alerts.yaml`` has alerts over both.
"""

from __future__ import annotations

import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from flexlora.config.resolve import Config
from flexlora.server.following.follower import FAILED, IDLE, RUNNING, WAITING, Follower
from flexlora.server.observing.prometheus import listening

__all__ = ["follower_endpoint", "free_port"]

STATES = (IDLE, WAITING, RUNNING, FAILED)
TIMEOUT_SECONDS = 2.0
LOOK_SECONDS = 15.0  # at the ServerApp's endpoint, where nobody scrapes


def free_port() -> int:
    """A port of the loopback on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _OfFollower(Collector):
    """The follower's standing as metrics, read at every scrape."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower

    def collect(self) -> Iterator[GaugeMetricFamily]:
        follower, standing = self.follower, self.follower.standing
        text = "What the follower of the federation does: 1 for one of the states"
        state = GaugeMetricFamily("flexlora_federation_state", text, labels=["state"])
        for name in STATES:
            state.add_metric([name], float(follower.state == name))
        yield state
        values = {
            "starts": ("Times that a ServerApp was started by this follower", follower.starts),
            "runs_finished": ("Runs of the federation that finished", standing.finished),
            "runs_failed": ("Runs of the federation that failed", standing.failed),
        }
        for name, (text, value) in values.items():
            yield GaugeMetricFamily(f"flexlora_federation_{name}", text, value=float(value))
        text = "Free bytes of the disk with the run folders"
        free = shutil.disk_usage(_existing(follower.place.state)).free
        yield GaugeMetricFamily("flexlora_disk_free_bytes", text, value=float(free))


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


class _Pages:
    """The ServerApp's last answer, in memory and in a file for the next follower."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self.file = follower.place.notes / f"{follower.place.name}-metrics.txt"
        self.registry = CollectorRegistry()
        self.registry.register(_OfFollower(follower))
        self.last = self.file.read_bytes() if self.file.is_file() else b""
        self._lock = threading.Lock()

    def page(self) -> bytes:
        self.refresh()
        return self.last + generate_latest(self.registry)

    def refresh(self) -> None:
        port = self.follower.standing.serverapp_port
        if not port or self.follower.state != RUNNING:
            return
        try:
            address = f"http://127.0.0.1:{port}/metrics"
            with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
                found = answer.read()
        except OSError:
            return
        with self._lock:
            self.last = found
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_bytes(found)


@contextmanager
def follower_endpoint(config: Config, follower: Follower) -> Iterator[None]:
    """Serve ``/metrics`` where ``server.metrics-host`` and ``-port`` say, if a port is given.

    Raises:
        UserError: the port is taken or not allowed, or the host is no address of this machine.
    """
    if config.server.metrics_port == 0:
        yield
        return
    pages, over = _Pages(follower), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            page = pages.page()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are no news."""

    def keep_looking() -> None:
        while not over.wait(LOOK_SECONDS):
            pages.refresh()

    with listening(config.server.metrics_host, config.server.metrics_port):
        server = ThreadingHTTPServer(
            (config.server.metrics_host, config.server.metrics_port), Handler
        )
    threads = [
        threading.Thread(target=t, daemon=True) for t in (server.serve_forever, keep_looking)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        for thread in threads:
            thread.join()
