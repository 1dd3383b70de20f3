"""A real ``flower-superlink`` on loopback, and ``flwr`` beside it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

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
