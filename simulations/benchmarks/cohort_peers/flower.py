"""The Flower app under ``flwr run``, on a SuperLink and a Ray of its own.

    python -m flexlora.simulations.benchmarks.cohort_peers.flower FOLDER REPORT
        [--cache] [--processes P]

The whole run is what ``flwr run`` takes. The SuperLink is started before, since a person who has
run anything today has one already; it and all that it started are gone afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from flexlora.simulations.benchmarks.cohort_peers.work import Work

APP = Path(__file__).parent / "flower_app"
BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ADDRESS": "local",
    "NO_COLOR": "1",
}
START_SECONDS, STOP_SECONDS = 60.0, 20.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("report")
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    report = Path(options.report).absolute()
    cache = str(options.cache).lower()
    run_config = f'work="{Path(options.folder).absolute()}" report="{report}" cache={cache}'
    supernodes = len(Work.read(options.folder).clients)
    resources = (
        f"num-supernodes={supernodes} client-resources-num-cpus=1 "
        f"init-args-num-cpus={options.processes}"
    )
    with superlink() as (environment, log):
        began = time.time()
        done = subprocess.run(
            [
                *(BIN / "flwr", "run", APP, "own", "--stream", "--run-config", run_config),
                *("--federation-config", resources),
            ],
            env=environment,
            cwd=environment["FLWR_HOME"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        whole = time.time() - began
        if not report.is_file():  # `flwr run` exits 0 whatever happens
            output = f"{done.stdout[-3000:]}\n{log.read_text()[-2000:]}"
            raise RuntimeError(f"the Flower run left no report.\n{output}")
    made = json.loads(report.read_text(encoding="utf-8"))
    report.write_text(json.dumps({**made, "began": began, "whole_seconds": whole}))


@contextmanager
def superlink() -> Iterator[tuple[Mapping[str, str], Path]]:
    """A SuperLink on a free loopback port with a home of its own; nothing of it stays."""
    # Ray's sockets lie under its folder, and a socket's path is at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="fl") as folder:
        home, port = Path(folder), _free_port()
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "own"\n\n[superlink.own]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        own = {"FLWR_HOME": folder, "RAY_TMPDIR": folder, "TMPDIR": folder, "PATH": path}
        environment = {**os.environ, **QUIET, **own}
        command = [str(BIN / "flower-superlink"), "--insecure", "--simulation"]
        host = ("--host", "127.0.0.1", "--port", str(port))
        log = home / "superlink.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *host, "--database", str(home / "state.db")],
                env=environment,
                stdout=file,
                stderr=file,
                cwd=home,
                start_new_session=True,
            )
        try:
            _wait_for(port, process, log)
            yield environment, log
        finally:
            process.terminate()
            _, alive = psutil.wait_procs(processes_of(folder), timeout=STOP_SECONDS)
            for left in alive:
                left.kill()
            psutil.wait_procs(alive, timeout=STOP_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the SuperLink did not start.\n{log.read_text()[-2000:]}")


def processes_of(home: str) -> list[psutil.Process]:
    """Every process, Ray's too, that was started under this FLWR_HOME."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == home:
                found.append(process)
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    main()
