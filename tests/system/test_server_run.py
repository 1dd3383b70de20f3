"""``flexlora server run`` over a real SuperLink: two federations at a time, one ServerApp killed.

The node is one of ``fleet_node.py``'s that trains in this process: it serves both runs in turn.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import ssl
import sys
import threading
import tomllib
import urllib.error
import urllib.request
from contextlib import suppress

import pytest
import tomli_w
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from deployment import Processes, free_port, once, tail, until
from federation import SMALL, client_rows, global_delta, largest_gap, rounds
from flexlora.clients.handler import answer
from flexlora.clients.worker import worker_for
from flexlora.config.resolve import Config
from flexlora.deploy.node_keys import make_node_keys
from flexlora.runs.audit_check import check_log
from flexlora.runs.folder import RunFolder
from flexlora.runs.live_state import read_live
from flexlora.server.init import server_init
from flexlora.simulations.benchmarks.fleet_connection import FleetRefused
from flexlora.simulations.benchmarks.fleet_node import StubNode
from flexlora.simulations.benchmarks.fleet_running import RunningFleet
from flexlora.simulations.simulate import simulate
from init_folders import free_ports

pytestmark = pytest.mark.slow

PATIENCE = 600  # seconds, on a machine with much other work
ROUNDS = {"app": 2, "north": 2}
CHANGES = {"app": {"method.name": "residual"}, "north": {"method.name": "flexlora"}}


class Training(StubNode):
    """A node whose answers are real; both federations have the same rows and base.

    What it has to say in the second round is held back until the test has done its worst.
    """

    worker = worker_for(Config.of(SMALL | {"clients.count": 1}))
    released = threading.Event()
    held: tuple = ()

    async def push(self, reply):
        if int(reply.metadata.group_id or 0) < 2 or self.released.is_set():
            return await super().push(reply)
        self.held += (asyncio.create_task(self._push_later(reply)),)

    async def _push_later(self, reply):
        while not self.released.is_set():
            await asyncio.sleep(0.1)
        with suppress(FleetRefused):  # nobody waits for it any more
            await super().push(reply)

    def answer(self, message):
        (client_id,) = self.worker.client_ids
        return answer(message.metadata.message_type, message.content, self.worker, client_id)


def config_of(name):
    values = {"clients.count": 1, "num-server-rounds": ROUNDS[name], "eval.every": 0}
    return SMALL | values | CHANGES[name]


def configure(app, values):
    table = tomllib.loads(app.read_text())
    config = table["tool"]["flwr"]["app"]["config"]
    for key, value in values.items():
        where, _, leaf = key.rpartition(".")
        (config[where] if where else config)[leaf] = value
    app.write_text(tomli_w.dumps(table))


def page(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            return answer.read().decode()
    except (OSError, urllib.error.URLError):
        return ""


def operate(folder):
    """Both federations to their end, and what can only be seen while they go."""
    server, port, seen = folder / "server", free_ports(2), {}
    metrics = free_port()
    server_init(folder=str(server), host=["localhost"], port=port, proxy="none")
    shutil.copytree(server / "app", server / "federations" / "north")
    configure(
        server / "app" / "pyproject.toml", config_of("app") | {"server.metrics-port": metrics}
    )
    configure(server / "federations" / "north" / "pyproject.toml", config_of("north"))
    (client_id,) = Training.worker.client_ids
    keys = make_node_keys(client_id)
    (server / "nodes" / f"{client_id}.pub").write_bytes(keys.public)
    logs = {name: folder / f"{name}.log" for name in ("superlink", "serverapps", *ROUNDS)}

    def shown():
        return "".join(tail(log) for log in logs.values())

    with Processes(folder) as processes:
        for name in ("superlink", "serverapps"):
            processes.keep([server / "bin" / f"start-{name}"], logs[name], folder / "home")
        ready = lambda: "Uvicorn running on" in logs["superlink"].read_text()  # noqa: E731
        until(ready, PATIENCE, shown)
        command = [sys.executable, "-m", "flexlora.commands.cli"]
        words = [*command, "fleet", "add", "--all", "--server", server]
        done = processes.start(words, folder / "register.log", folder / "home")
        assert done.wait(PATIENCE) == 0, tail(folder / "register.log")
        node = Training(
            f"localhost:{port}",
            key=load_ssh_private_key(keys.private, None),
            tls=ssl.create_default_context(cafile=str(server / "ca.crt")),
            poll_seconds=1.0,
        )
        command += ["server", "run", server]
        with RunningFleet([node]) as fleet:
            fleet.entered(PATIENCE)
            followers = {
                name: processes.start([*command, name], logs[name], folder / f"home-{name}")
                for name in ROUNDS
            }
            run = server / "state" / "serverapp" / "runs" / "app-0001"
            for path in (run, run.parent / "north-0001"):
                index = path / "checkpoint" / "round-000001.json"
                until(lambda index=index: index.is_file(), PATIENCE, shown)
            until(lambda: "flexlora_round " in page(metrics), PATIENCE, shown)
            os.kill(read_live(run).pid, signal.SIGKILL)
            followers["north"].send_signal(signal.SIGINT)
            seen["interrupted"] = followers["north"].wait(PATIENCE)
            node.released.set()
            seen["north said"] = logs["north"].read_text()
            words = [*command, "north"]
            followers["north"] = processes.start(words, logs["north"], folder / "home-north")
            waiting = 'flexlora_federation_state{state="waiting"} 1.0'
            until(lambda: waiting in page(metrics), PATIENCE, shown)
            seen["between"] = page(metrics)
            for name, follower in followers.items():
                until(lambda s=follower: s.poll() is not None, PATIENCE, shown)
                seen[name] = follower.poll()
            seen["refusals"] = [str(refusal) for refusal in node.refusals]
    return {
        **seen,
        "runs": {name: str(run.parent / f"{name}-0001") for name in ROUNDS},
        "said": {name: logs[name].read_text() for name in ROUNDS},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return once(tmp_path_factory, "server-run", operate)


def test_both_federations_finish_in_folders_of_their_own(made):
    assert (made["app"], made["north"]) == (0, 0), made["said"]
    for name, folder in made["runs"].items():
        assert [row["round"] for row in rounds(folder)] == list(range(ROUNDS[name] + 1))
        assert {row["status"] for row in client_rows(folder)} == {"ok"}
        assert "finished" in made["said"][name].splitlines()[-1]
    stopped = "The current run status does not allow"  # the reply to a run that was just stopped
    assert [refusal for refusal in made["refusals"] if stopped not in refusal] == []


def test_the_killed_server_app_went_on_from_its_checkpoint(made):
    said = made["said"]["app"]
    assert "the run ended after round" in said and "goes on in" in said
    events = check_log(RunFolder(made["runs"]["app"]))
    assert events.problems == [] and sum("resumed" in line for line in events.lines) == 1


def test_ctrl_c_stops_the_run_and_the_next_command_goes_on_with_it(made):
    assert made["interrupted"] == 130
    assert "is stopped; `flexlora server run` goes on with it" in made["north said"]
    assert "Traceback" not in made["north said"]
    assert "goes on in" in made["said"]["north"].removeprefix(made["north said"])
    events = check_log(RunFolder(made["runs"]["north"]))
    assert events.problems == [] and sum("resumed" in line for line in events.lines) == 1


@pytest.mark.parametrize("name", ROUNDS)
def test_each_learned_what_it_learns_alone(name, made, tmp_path):
    simulate(Config.of(config_of(name)), tmp_path / name)
    assert largest_gap(global_delta(made["runs"][name]), global_delta(tmp_path / name)) < 1e-5


def test_the_metrics_stay_up_while_nothing_runs(made):
    between = made["between"]
    assert "flexlora_federation_starts 1.0" in between
    assert "flexlora_round " in between and "flexlora_info{" in between, "the last values"
    assert "flexlora_disk_free_bytes " in between
