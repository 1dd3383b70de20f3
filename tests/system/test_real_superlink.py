"""The doctor asks a real ``flower-superlink`` on loopback, with TLS and node authentication.

What ``tls_servers.Said`` answers in the fast tests is what Flower answers here.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flexlora.clients.setup import node_key_checks
from tls_servers import asked, key_file, only

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_proxy")]
BIN = Path(sys.executable).parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flower_environment(home, port, roots):
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
        + (f'root-certificates = "{roots}"\n' if roots else "insecure = true\n")
    )
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_COLOR": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


@contextmanager
def real_superlink(folder, *arguments, roots=None):
    """The port and the environment of a ``flower-superlink``; it ends with the block."""
    port = free_port()
    environment = flower_environment(folder, port, roots)
    command = [BIN / "flower-superlink", "--host", "127.0.0.1", "--port", port, *arguments]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, cwd=folder, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 300
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", port)):
                assert process.poll() is None and time.monotonic() < deadline, (
                    folder / "log"
                ).read_text()
                time.sleep(0.2)
        yield port, environment
    finally:
        started = [process, *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs([psutil.Process(p.pid) for p in started[1:]], timeout=60)
        for left in alive:
            left.kill()
        process.wait(timeout=60)


def flwr(environment, *words):
    done = subprocess.run(
        [BIN / "flwr", *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_real_superlink_with_tls_and_node_authentication(tmp_path, ca, leaf, monkeypatch):
    """The answers that ``Said`` gives are those of Flower, and asking changes nothing there."""
    key = key_file(tmp_path)
    tls = (
        "--ssl-certfile",
        leaf.file,
        "--ssl-keyfile",
        leaf.key_file,
        "--ssl-ca-certfile",
        ca.file,
    )
    given = (*tls, "--enable-supernode-auth", "--database", tmp_path / "state.db")
    with real_superlink(tmp_path, *given, roots=ca.file) as (port, environment):
        found = asked(port, ca, key=key)
        ours = [
            found[name].status for name in ("certificate", "superlink", "clock", "control path")
        ]
        assert ours == ["ok"] * 4 and "of Flower 1.41" in found["superlink"].message
        assert "does not know the key" in found["node key"].message
        flwr(environment, "supernode", "register", f"{key}.pub", "own")
        assert asked(port, ca, key=key)["node key"].message.endswith("is registered")
        for off, status in ((8.0, "failed"), (3.0, "ok"), (-300.0, "ok"), (-308.0, "failed")):
            clock = SimpleNamespace(time=lambda off=off: time.time() + off)
            monkeypatch.setattr(node_key_checks, "time", clock)
            assert asked(port, ca, key=key)["node key"].status == status, off
        nodes = json.loads(flwr(environment, "supernode", "list", "own", "--format", "json"))
        assert [node["status"] for node in nodes["nodes"]] == ["registered"], nodes
        only(asked(port), "failed", "certificate", "whom this machine does not trust")


def test_a_real_superlink_in_the_clear(tmp_path, ca):
    with real_superlink(tmp_path, "--insecure") as (port, _):
        found = asked(port)
        assert {finding.status for finding in found.values()} == {"ok"}, found
        assert "over plain HTTP" in found["superlink"].message
        only(asked(port, ca), "failed", "certificate", "speaks plain HTTP")
