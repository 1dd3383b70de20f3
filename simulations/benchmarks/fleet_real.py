"""Real SuperNodes with resident trainers for the fleet benchmark, each process as in a deployment.

``flexlora client serve`` over the built-in rows of one client, and ``flower-supernode``, which
starts a ClientApp process for every message. The embedded base, one thread a trainer.
"""

from __future__ import annotations

import csv
import sys
import time
from typing import Any

from flexlora.clients.trainer.sockets import connection_error
from flexlora.simulations.benchmarks.fleet_deployment import Server, free_port
from flexlora.simulations.benchmarks.resident import write_built_in

__all__ = ["RealNodes", "train_seconds"]

START_SECONDS = 300.0
SERVE = ["-m", "flexlora.commands.cli", "client", "serve", "--model", "embedded"]


class RealNodes:
    """So many nodes of ``server``; they are its processes and end with it."""

    def __init__(self, server: Server, nodes: int) -> None:
        self.server, self.nodes = server, nodes
        self._sockets = [server.home / f"t{place}" for place in range(nodes)]
        data = write_built_in(server.home / "rows")
        for place, socket in enumerate(self._sockets):
            words = [sys.executable, *SERVE, "--data", str(data), "--socket", str(socket)]
            words += ["--state", str(server.home / f"kept{place}"), "--set", "engine.threads=1"]
            server.start(words, f"trainer{place}", {"OMP_NUM_THREADS": "1"})

    def enter(self) -> float:
        """Start the SuperNodes once their trainers listen; the seconds until then.

        Raises:
            RuntimeError: a trainer does not listen in time.
        """
        began = time.monotonic()
        for place, socket in enumerate(self._sockets):
            while why := connection_error(socket):
                if time.monotonic() > began + START_SECONDS:
                    raise RuntimeError(f"trainer {place} does not listen: {why}")
                time.sleep(0.1)
            self._supernode(place, str(socket))
        return time.monotonic() - began

    def _supernode(self, place: int, socket: str) -> None:
        server = self.server
        trust = ["--root-certificates", str(server.home / "ca.crt")] if server.tls else []
        config = f'client-id="site_{place:04d}" trainer-socket="{socket}"'
        server.start(
            [
                *("flower-supernode", *(trust or ["--insecure"]), "--superlink", server.address),
                *("--host", "127.0.0.1", "--port", str(free_port()), "--node-config", config),
            ],
            f"node{place}",
            {"FLWR_HOME": str(server.home / f"home{place}")},
        )

    def done(self) -> dict[str, Any]:
        """Nothing is counted inside of real nodes."""
        counts: dict[str, Any] = {"requests": {}, "answered": {}, "refusal": ""}
        numbers = ("bytes_up", "bytes_down", "retries", "refusals", "cpu_seconds")
        return counts | dict.fromkeys(numbers, 0)

    def end(self) -> None:
        """They end with the server's processes."""


def train_seconds(server: Server) -> list[float]:
    """Of each round the longest training, as the nodes report it."""
    longest: dict[int, float] = {}
    with (server.home / "run" / "clients.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            place, seconds = int(row["round"]), float(row["seconds"] or 0.0)
            longest[place] = max(longest.get(place, 0.0), seconds)
    return [longest[place] for place in sorted(longest) if place > 0]
