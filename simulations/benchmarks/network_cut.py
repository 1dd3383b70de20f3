"""A federation whose network is cut in mid-round: every node's update is there all the same.

    sudo python -m flexlora.simulations.benchmarks.network_cut [--cut 150] [--nodes 3] [--cut-off 2]
        [--rounds 3] [--json FILE]

Real processes from real folders (``server init``, ``client init``, their ``bin/``) over TLS and
through the proxy, each machine a network namespace of Linux on one bridge. In round 2, while the
nodes train, the bridge's ports of ``--cut-off`` nodes go down: no packet passes, without an error,
as with a cable that is pulled. Needs root, ``ip`` and ``nginx``; minutes, so it is no test of CI.

    ratio = updates that the round of the cut is without
    error = 0: a run that does not complete ends the benchmark

The default has half an hour's patience; the cut is longer than the 60 s after which a SuperLink
counts a node as gone, so that its messages are lost and sent again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tomli_w

from flexlora.clients.trainer.client import health
from flexlora.data.tasks import generate_rows
from flexlora.errors import UserError

__all__ = ["CutRow", "main"]

BRIDGE, SERVER = "flxcut", "flxcut-s"
ADDRESS = "10.199.7.{}"
PORT = 9092
PATIENCE = 1800.0
TASKS = ("past_tense", "rotate_list", "tallest")
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
SETTINGS = {
    "method.name": "residual",
    "ranks.tiers": "4",
    "ranks.shares": "equal",
    "lora.target-modules": "q_proj,v_proj",
    "train.max-length": 128,
    "train.max-steps": 200,
    "train.per-device-train-batch-size": 2,
    "eval.max-examples": 1,
    "eval.generate": "never",
    "eval.every": 0,
    "server.round-timeout-seconds": PATIENCE,
    "server.wait-seconds": 300.0,
}


@dataclass(frozen=True, kw_only=True)
class CutRow:
    """One run with a cut; seconds of its rounds."""

    name: str
    ratio: float
    target: float
    error: float
    cut_seconds: float
    round_seconds: tuple[float, ...]
    statuses: tuple[str, ...]
    causes: tuple[str, ...]

    @property
    def met(self) -> bool:
        return self.ratio <= self.target


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the row; status 1 where an update is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cut", type=float, default=150.0, help="seconds")
    parser.add_argument("--nodes", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--cut-off", type=int, default=2, help="how many of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    if os.geteuid() or not (shutil.which("ip") and shutil.which("nginx")):
        raise UserError("network namespaces need root, `ip` (iproute2) and `nginx`.")
    with tempfile.TemporaryDirectory(prefix="flx-", dir="/tmp") as folder:
        row = measure(Path(folder), given.nodes, given.cut_off, given.cut, given.rounds)
    print(json.dumps(asdict(row), indent=1))
    if given.json:
        given.json.write_text(json.dumps([asdict(row)], indent=1) + "\n", encoding="utf-8")
    return 0 if row.met else 1


def measure(place: Path, nodes: int, cut_off: int, seconds: float, rounds: int) -> CutRow:
    """The run in the folder ``place``."""
    with namespaces(nodes), Machines(place) as machines:
        names = [f"site-{k}" for k in range(nodes)]
        make_folders(machines, names)
        configure(place / "server", {**SETTINGS, "num-server-rounds": rounds}, nodes)
        for script, ready in (("superlink", "Uvicorn running"), ("proxy", "start worker process")):
            machines.start(SERVER, place / "server" / "bin" / f"start-{script}", ready)
        machines.start(SERVER, place / "server/bin/start-serverapps", "Flower SuperExec")
        words = ["flexlora", "fleet", "add", "--all", "--server", str(place / "server")]
        machines.run(SERVER, words)
        for k, name in enumerate(names):
            for script, ready in (
                ("trainer", "ready on"),
                ("supernode", "SuperNode ID"),
                ("clientapps", "Flower SuperExec"),
            ):
                machines.start(f"flxcut-{k}", place / name / "bin" / f"start-{script}", ready)
        home = {"FLWR_HOME": str(place / "server" / "flwr")}
        app = str(place / "server" / "app")
        machines.run(SERVER, ["flwr", "run", app, "flexlora"], **home)
        trainers = [place / name / "state" / "run" / "trainer.sock" for name in names]
        until(lambda: all(training(socket, 2) for socket in trainers[:cut_off]), "round 2")
        cut(range(cut_off), seconds)
        run = next((place / "server/state/serverapp/runs").iterdir())
        until(lambda: len(metrics(run)) > rounds, f"round {rounds}")
        return row_of(run, nodes, cut_off, seconds)


def row_of(run: Path, nodes: int, cut_off: int, seconds: float) -> CutRow:
    with (run / "clients.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["round"] == "2"]
    closed = metrics(run)
    return CutRow(
        name=f"{cut_off} of {nodes} nodes cut off for {seconds:g} s in round 2",
        ratio=float(nodes - sum(row["status"] == "ok" for row in rows)),
        target=0.0,
        error=0.0,
        cut_seconds=seconds,
        round_seconds=tuple(round(float(row["seconds"]), 1) for row in closed[1:]),
        statuses=tuple(row["status"] for row in rows),
        causes=tuple(row["cause"] for row in rows),
    )


def metrics(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def training(socket: Path, server_round: int) -> bool:
    try:
        doing = health(socket).doing
    except UserError:
        return False
    return doing.startswith("train") and doing.endswith(f"round {server_round}")


def cut(nodes: range, seconds: float) -> None:
    """Take the bridge's ports of ``nodes`` down, and up again."""
    for k in nodes:
        ip("link", "set", f"flxcut{k}", "down")
    print(f"{len(nodes)} nodes are cut off", flush=True)
    time.sleep(seconds)
    for k in nodes:
        ip("link", "set", f"flxcut{k}", "up")
    print(f"they are back after {seconds:g} s", flush=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def namespaces(nodes: int) -> Iterator[None]:
    """A bridge, the server's namespace at address 1, the nodes' from 10 on."""
    places = [
        (SERVER, "flxcuts", 1),
        *((f"flxcut-{k}", f"flxcut{k}", 10 + k) for k in range(nodes)),
    ]
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        for name, link, number in places:
            ip("netns", "add", name)
            ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", link, "master", BRIDGE, "up")
            inside = ["-n", name]
            ip(*inside, "addr", "add", f"{ADDRESS.format(number)}/24", "dev", "eth0")
            ip(*inside, "link", "set", "eth0", "up")
            ip(*inside, "link", "set", "lo", "up")
        yield
    finally:
        for name, _, _ in places:
            subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)


class Machines:
    """Processes in namespaces; all end with the block."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.programs = Path(sys.executable).parent
        path = f"{self.programs}{os.pathsep}{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin"
        self.environment = {**os.environ, **QUIET, "PATH": path}
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._started):
            os.killpg(process.pid, signal.SIGTERM) if process.poll() is None else None
        for process in self._started:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(f"/var/lib/flexlora-proxy-{PORT}", ignore_errors=True)

    def start(self, namespace: str, script: Path, ready: str) -> None:
        """A script of a folder, once its log has the word ``ready``."""
        log = self.place / f"{namespace}-{script.name}.log"
        words = ["ip", "netns", "exec", namespace, str(script)]
        with log.open("w") as out:
            process = subprocess.Popen(
                words, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )
        self._started.append(process)
        until(lambda: ready in log.read_text(errors="replace"), f"{script.name}: {ready}", log)

    def run(self, namespace: str, words: Sequence[str], **more: str) -> None:
        """A command that ends well."""
        subprocess.run(
            ["ip", "netns", "exec", namespace, *words], env={**self.environment, **more}, check=True
        )


def make_folders(machines: Machines, names: Sequence[str]) -> None:
    """The server's folder and the nodes', and each node's public key where it is let in."""
    place, host = machines.place, ADDRESS.format(1)
    words = ["flexlora", "server", "init", str(place / "server"), "--host", host]
    machines.run(SERVER, [*words, "--port", str(PORT), "--proxy", "nginx"])
    for name, task in zip(names, TASKS, strict=False):
        write_rows(place / f"rows-{name}", task)
        words = ["flexlora", "client", "init", str(place / name), "--superlink", f"{host}:{PORT}"]
        words += ["--root-certificates", str(place / "server" / "ca.crt"), "--client-id", name]
        machines.run(SERVER, [*words, "--data", str(place / f"rows-{name}"), "--device", "cpu"])
        shutil.copy(place / name / "keys/node.pub", place / "server" / "nodes" / f"{name}.pub")


def write_rows(folder: Path, task: str) -> None:
    folder.mkdir()
    for split in ("train", "validation"):
        rows = generate_rows(task, split, 12, seed=0)
        lines = (
            json.dumps({k: getattr(r, k) for k in ("instruction", "input", "output")}) for r in rows
        )
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def configure(server: Path, values: dict[str, object], nodes: int) -> None:
    """Write ``values`` into the app that the server's owner runs."""
    path = server / "app" / "pyproject.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    config = table["tool"]["flwr"]["app"]["config"]
    for key, value in {**values, "server.min-nodes": nodes, "server.quorum": nodes}.items():
        group, _, leaf = key.rpartition(".")
        (config[group] if group else config)[leaf] = value
    path.write_text(tomli_w.dumps(table), encoding="utf-8")


def until(condition: Callable[[], bool], what: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            output = log.read_text(errors="replace")[-3000:] if log else ""
            raise RuntimeError(f"{what} did not come within {PATIENCE:g} s\n{output}")
        time.sleep(0.2)


if __name__ == "__main__":
    raise SystemExit(main())
