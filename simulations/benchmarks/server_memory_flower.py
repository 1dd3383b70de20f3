"""A case behind a real SuperLink on loopback: ``flwr run`` starts the ServerApp that is measured.

SuperLink, ServerApp and nodes are processes of their own and end with the measurement. What arrives
lies in the SuperLink's memory until the ServerApp fetches it: with ``--database`` SQLite was locked
for so long by replies of 40 MB that nodes were answered with errors and left.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from flexlora.simulations.benchmarks.cohort_peers.flower import BIN, QUIET, processes_of
from flexlora.simulations.benchmarks.server_memory_answers import ServerCase

__all__ = ["measured_by_flower"]

APP = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "flexlora-server-memory"
version = "0.1.0"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.42"]

[tool.flwr.app]
publisher = "flexlora"
fab-include = ["pyproject.toml"]

[tool.flwr.app.components]
serverapp = "flexlora.simulations.benchmarks.server_memory_case:app"
clientapp = "flexlora.clients.app:app"

[tool.flwr.app.config]
case = ""
report = ""
"""
LINK = """\
[superlink]
default = "own"

[superlink.own]
address = "{address}"
insecure = true
"""
START_SECONDS, STOP_SECONDS = 60.0, 20.0


def measured_by_flower(case: ServerCase, seconds: float) -> dict[str, float]:
    """What ``server_memory_case.measure`` finds in a ServerApp that Flower has started.

    Raises:
        RuntimeError: no report after so many seconds, with what Flower's processes said.
    """
    with tempfile.TemporaryDirectory(prefix="fl") as name:
        home = Path(name)
        (home / "app").mkdir()
        (home / "app" / "pyproject.toml").write_text(APP, encoding="utf-8")
        (home / "case.json").write_text(case.to_json(), encoding="utf-8")
        report = home / "report.json"
        with _superlink(home) as (environment, address), _nodes(address, case, environment):
            config = f'case="{home / "case.json"}" report="{report}"'
            command = [str(BIN / "flwr"), "run", str(home / "app"), "own", "--stream"]
            done = subprocess.run(
                [*command, "--run-config", config],
                env=environment,
                cwd=home,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
            )
        if not report.is_file():  # `flwr run` exits 0 whatever happens
            log = (home / "superlink.log").read_text(encoding="utf-8")
            raise RuntimeError(
                f"the ServerApp left no report.\n{done.stdout[-3000:]}\n{log[-2000:]}"
            )
        return json.loads(report.read_text(encoding="utf-8"))


@contextmanager
def _superlink(home: Path) -> Iterator[tuple[Mapping[str, str], str]]:
    """A SuperLink with ``home`` for its own, once it listens; its processes end with the block."""
    port = _free_port()
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(LINK.format(address=address), encoding="utf-8")
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path}
    with (home / "superlink.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [
                *(str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1"),
                *("--port", str(port)),
            ],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=home,
            start_new_session=True,
        )
    try:
        _wait_until_it_listens(process, port, home)
        yield environment, address
    finally:
        process.terminate()
        _, alive = psutil.wait_procs(processes_of(str(home)), timeout=STOP_SECONDS)
        for left in alive:
            left.kill()
        psutil.wait_procs(alive, timeout=STOP_SECONDS)


@contextmanager
def _nodes(address: str, case: ServerCase, environment: Mapping[str, str]) -> Iterator[None]:
    module = "flexlora.simulations.benchmarks.server_memory_nodes"
    command = [sys.executable, "-m", module, address, case.to_json()]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_it_listens(process: subprocess.Popen, port: int, home: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    log = (home / "superlink.log").read_text(encoding="utf-8")
    raise RuntimeError(f"the SuperLink did not start.\n{log[-2000:]}")
