"""The same apps on Flower's own engine, and message by message through the ClientApp."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from flwr.app import Context, RecordDict

from federation import (
    ONE_THREAD,
    ROOT,
    SMOKE,
    adapter_bytes,
    client_rows,
    federation,
    global_delta,
    relative_gap,
    rounds,
    small,
    untimed,
)
from flexlora.clients.app import app as client_app
from flexlora.clients.worker import worker_for
from flexlora.config.resolve import Config
from flexlora.server.app import app as server_app
from flexlora.simulations.engine.cohorts import CohortLimits
from flexlora.simulations.engine.grid import InProcessGrid
from flexlora.simulations.simulate import simulate

BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONWARNINGS": "ignore",
    "NO_COLOR": "1",
}


def context_of(config, node_id=0, **node_config):
    return Context(
        run_id=1,
        node_id=node_id,
        node_config=node_config,
        state=RecordDict(),
        run_config=config.flat(),
    )


class ClientAppGrid(InProcessGrid):
    """Every message goes through the ClientApp as a node of Flower's would call it, one by one."""

    def __init__(self, config, node_configs):
        limits, wire_dtype = CohortLimits(clients=1), config.wire.dtype
        super().__init__(worker_for(config), limits=limits, wire_dtype=wire_dtype)
        self.config = config
        self._clients = dict(enumerate(node_configs, start=1))
        self.waiting = {}

    def push_messages(self, messages):
        ids = []
        for message in messages:
            self._pushed += 1
            ids.append(f"message-{self._pushed}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids):
        return [self.answer(self.waiting.pop(key)) for key in message_ids if key in self.waiting]

    def answer(self, message):
        node = message.metadata.dst_node_id
        return client_app(message, context_of(self.config, node, **self._clients[node]))


def partitions(count):
    return [{"partition-id": number, "num-partitions": count} for number in range(count)]


def test_the_client_app_and_the_engine_give_the_same_bytes(tmp_path):
    """One boundary, decode - train - encode, whoever calls it."""
    config = small(num_server_rounds=2, engine__cohort_size=1, lora__dropout=0.1)
    simulate(config, tmp_path / "engine")
    federation(ClientAppGrid(config, partitions(4)), config, tmp_path / "app")
    assert adapter_bytes(tmp_path / "app") == adapter_bytes(tmp_path / "engine")
    runs = [untimed(rounds(tmp_path / name)) for name in ("app", "engine")]
    for first, second in zip(*runs, strict=True):
        assert first.keys() == second.keys()
        assert first.pop("modules", None) == second.pop("modules", None)
        for key in first:
            assert first[key] == pytest.approx(second[key], rel=1e-6)


def test_the_server_app_runs_over_any_grid_and_leaves_a_run_folder(tmp_path):
    config = small(out=str(tmp_path / "served"))
    grid = InProcessGrid(worker_for(config), limits=CohortLimits(clients=8), wire_dtype="float32")
    server_app(grid, context_of(config))
    simulate(small(), tmp_path / "simulated")
    assert adapter_bytes(tmp_path / "served") == adapter_bytes(tmp_path / "simulated")
    assert len(rounds(tmp_path / "served")) == 2


def test_nodes_that_cannot_be_a_client_are_left_out_with_their_cause(tmp_path):
    """More nodes than clients; a node without any data; data that is not there."""
    config = small()
    odd = [{"partition-id": 9}, {}, {"data-path": str(tmp_path / "gone"), "client-id": "zoe"}]
    _, run = federation(ClientAppGrid(config, [*partitions(4), *odd]), config, tmp_path / "run")
    causes = [row["cause"] for row in client_rows(run.path) if row["status"] == "left out"]
    assert len(causes) == 3
    for words in ("partition 9 has no client", "neither data-path nor", "gone' does not exist"):
        assert any(words in cause for cause in causes), causes
    assert rounds(run.path)[1]["clients_ok"] == 4


def test_a_node_with_its_own_data_folder_is_one_client_by_its_own_name(tmp_path):
    """Its rows may name several people: they are one client here, and never leave the folder."""
    nodes = []
    for name, answer in (("north", "yes"), ("south", "no")):
        folder = tmp_path / name
        folder.mkdir()
        row = f'{{"instruction": "Say {answer}.", "output": "{answer}", "client": "c%d"}}\n'
        for split in ("train", "validation"):
            (folder / f"{split}.jsonl").write_text("".join(row % n for n in range(4)))
        nodes.append({"data-path": str(folder), "client-id": name})
    config = small(clients__count=0)
    strategy, run = federation(ClientAppGrid(config, nodes), config, tmp_path / "run")
    assert sorted(strategy.roster.members) == ["north", "south"]
    trained = client_rows(run.path, 1)
    assert [(r["client_id"], r["num_examples"], r["status"]) for r in trained] == [
        ("north", "4", "ok"),
        ("south", "4", "ok"),
    ]


@pytest.mark.slow
def test_the_app_bundle_holds_no_code(tmp_path):
    done = subprocess.run(
        [BIN / "flwr", "build", "--app", ROOT],
        cwd=tmp_path,
        env={**os.environ, **QUIET, "FLWR_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    (bundle,) = tmp_path.glob("*.fab")
    assert done.returncode == 0
    names = zipfile.ZipFile(bundle).namelist()
    assert {"pyproject.toml", "LICENSE"} <= set(names)
    assert not [name for name in names if name.endswith((".py", ".pyc", ".safetensors"))]


@pytest.fixture
def superlink(tmp_path):
    """A SuperLink of the test's own on a free loopback port; it and all it started end with it."""
    home = tmp_path / "flwr"
    home.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    environment = {
        **os.environ,
        **QUIET,
        **ONE_THREAD,
        "FLWR_HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": "/tmp",  # Ray's sockets need a short path
    }
    with (tmp_path / "superlink.log").open("w") as log:
        process = subprocess.Popen(
            [
                *(BIN / "flower-superlink", "--insecure", "--simulation"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--database", home / "state.db"),
            ],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while not listening(process.pid):
            assert process.poll() is None, (tmp_path / "superlink.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "superlink.log").read_text()
            time.sleep(0.2)
        yield process, environment
    finally:
        process.terminate()
        _, alive = psutil.wait_procs(processes_of(home), timeout=20)
        for left in alive:
            left.kill()


def processes_of(home):
    """Every process, Ray's too, that was started under this FLWR_HOME."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return found


def listening(pid):
    """The addresses on which a process accepts connections."""
    connections = psutil.Process(pid).net_connections(kind="inet")
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


@pytest.mark.slow
def test_flwr_run_agrees_with_the_engine_and_leaves_no_process(superlink, tmp_path):
    """Four supernodes on Ray and the smoke scenario; a node trains one client, as K = 1 does."""
    process, environment = superlink
    scenario = Config.resolve(file=SMOKE, sets=("clients.count=4", "engine.threads=1"))
    changed = scenario.changed()
    changed["out"] = str(tmp_path / "flower")
    override = " ".join(
        f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
        for key, value in changed.items()
    )
    running = subprocess.Popen(
        [
            *(BIN / "flwr", "run", ROOT, "own", "--stream", "--run-config", override),
            *("--federation-config", "num-supernodes=4 client-resources-num-cpus=1"),
        ],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    simulate(scenario.with_values({"engine.cohort-size": 1}), tmp_path / "engine")  # meanwhile
    try:
        out, _ = running.communicate(timeout=600)
    finally:
        running.kill()
    assert listening(process.pid) == {"127.0.0.1"}
    assert [row["round"] for row in rounds(tmp_path / "flower")] == [0, 1, 2], out[-3000:]
    assert re.search(r"round 2/2: 2 clients", out) and "rank class rank_2" in out
    theirs, ours = rounds(tmp_path / "flower"), rounds(tmp_path / "engine")
    for first, second, bound in zip(theirs, ours, (1e-6, 1e-5, 1e-5), strict=True):
        assert first["eval_loss"] == pytest.approx(second["eval_loss"], rel=bound)
        for key in ("clients_ok", "bytes_down", "bytes_up"):
            assert first.get(key) == second.get(key)
    assert relative_gap(global_delta(tmp_path / "flower"), global_delta(tmp_path / "engine")) < 1e-5
    names = sorted(path.name for path in (tmp_path / "flower" / "adapters").iterdir())
    assert names == ["global", "rank_2", "rank_4", "rank_8"]

    assert processes_of(environment["FLWR_HOME"])
    process.terminate()
    process.wait(120)
    _, alive = psutil.wait_procs(processes_of(environment["FLWR_HOME"]), timeout=120)
    assert [left.name() for left in alive] == []
