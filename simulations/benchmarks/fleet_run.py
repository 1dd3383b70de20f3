"""One case of the fleet benchmark, in the tree of code that this process imports.

    python -m flexlora.simulations.benchmarks.fleet_run CASE_AS_JSON

It prints one line of JSON. A round is the time between two rows of ``metrics.jsonl``: training,
evaluation, rows and checkpoint. Processor seconds are those between the row of round 0 (the base's
evaluation) and the last one, so that the start does not count.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import flexlora
from flexlora.simulations.benchmarks.fleet_case import FleetCase
from flexlora.simulations.benchmarks.fleet_deployment import Server
from flexlora.simulations.benchmarks.fleet_real import RealNodes, train_seconds

__all__ = ["main", "measured"]

LOOK_SECONDS = 0.1
STUBS = "flexlora.simulations.benchmarks.fleet_stubs"


class Stubs:
    """The process of the stub nodes."""

    def __init__(self, server: Server, case: FleetCase) -> None:
        words = [sys.executable, "-m", STUBS, server.address, case.to_json(), str(server.home)]
        self._log = server.home / "stubs.log"
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def enter(self) -> float:
        """Seconds until all nodes were in."""
        return float(self._heard()["enter_seconds"])

    def _heard(self) -> dict[str, Any]:
        """The next line that it says.

        Raises:
            RuntimeError: it has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the stub nodes ended: {self._log.read_text()[-2000:]}")
        return json.loads(line)

    def done(self) -> dict[str, Any]:
        """What the nodes have done so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._heard()

    def end(self) -> None:
        """Let the nodes leave; they are given up after some seconds."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Watch:
    """The rows of a run as they come, with what had been used by then."""

    def __init__(self, server: Server, nodes: Stubs | RealNodes) -> None:
        self.server, self.nodes = server, nodes
        self.rows: list[dict[str, Any]] = []
        self.marks: list[dict[str, Any]] = []  # one for each row
        self._file = server.home / "run" / "metrics.jsonl"

    def look(self) -> None:
        """Note what has been used, and mark each new row by it."""
        self.server.look()
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        for line in lines[len(self.rows) :]:
            self.rows.append(json.loads(line))
            seconds = dict(self.server.seconds)
            done = {"at": time.monotonic(), "seconds": seconds, **self.nodes.done()}
            self.marks.append(done)


def measured(case: FleetCase, home: Path) -> dict[str, Any]:
    """Run a case below ``home``.

    Raises:
        RuntimeError: a process that ended, or a run that failed before its first row.
    """
    began = time.monotonic()
    with Server(home, tls=case.tls, stored=case.stored) as server:
        nodes = RealNodes(server, case.nodes) if case.real else Stubs(server, case)
        try:
            entered = nodes.enter()
            submitted = time.monotonic()
            server.submit(case.config(home))
            watch = Watch(server, nodes)
            deadline = began + case.limit_seconds
            while len(watch.rows) <= case.rounds and time.monotonic() < deadline:
                if server.ended:
                    break
                time.sleep(LOOK_SECONDS)
                watch.look()
            last = nodes.done()
            found = _found(case, watch, submitted, last)
            found |= {"enter_seconds": entered, "database_bytes": server.database_bytes()}
            if case.real and watch.rows[1:]:
                found["train_seconds"] = train_seconds(server)
            if len(watch.rows) <= case.rounds:
                found["stopped"] = f"{server.ended} ended" if server.ended else "too slow"
                found["log"] = server.said("apps")
        finally:
            nodes.end()
    return {**found, "peaks": server.peaks, "tree": str(Path(flexlora.__file__).parent)}


def _found(case: FleetCase, watch: Watch, submitted: float, last: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the rounds that were closed, and how far the open one has come."""
    marks, waited = watch.marks, time.monotonic() - submitted
    found: dict[str, Any] = {
        "rounds": max(0, len(marks) - 1),
        "waited_seconds": waited,
        "answered": last["answered"],
        "retries": last["retries"],
        "refusals": last["refusals"],
        "refusal": last["refusal"],
        "all_seconds": dict(watch.server.seconds),
        "stub_seconds": last["cpu_seconds"],
        "ok": [row.get("clients_ok", 0) for row in watch.rows[1:]],
    }
    if marks:
        found["start_seconds"] = marks[0]["at"] - submitted
        found["start_cpu"] = marks[0]["seconds"]
    if len(marks) > 1:
        first, end, rounds = marks[0], marks[-1], len(marks) - 1
        spans = [b["at"] - a["at"] for a, b in pairwise(marks)]
        cpu = {k: (end["seconds"][k] - first["seconds"][k]) / rounds for k in end["seconds"]}
        calls: dict[str, float] = {
            k: (end["requests"][k] - first["requests"].get(k, 0)) / rounds / case.nodes
            for k in end["requests"]
        }
        sizes = {
            key: (end[key] - first[key]) / rounds / case.nodes for key in ("bytes_up", "bytes_down")
        }
        found |= {"round_seconds": spans, "median_seconds": median(spans), "cpu": cpu}
        found |= {"calls": calls, "requests": sum(calls.values()), **sizes}
        found["stub_cpu"] = (end["cpu_seconds"] - first["cpu_seconds"]) / rounds
    return found


def main(arguments: Sequence[str]) -> None:
    """Print what one case has found; what it started ends with it, also when it is terminated."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="fl") as name:
        print(json.dumps(measured(FleetCase.from_json(arguments[0]), Path(name))))


if __name__ == "__main__":
    main(sys.argv[1:])
