"""A fleet against a real SuperLink, proxy and enrolment: fifty nodes by one script, then revoke,
rotate and list, a run with a node of another minor version and one that uses another's name.

Eight of the fifty take part in the run; ``FLEXLORA_TEST_FLEET=50`` has all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tomli_w

import flexlora
from deployment import QUIET, SLOWLY, tail, until
from federation import ONE_THREAD, client_rows
from fleet_nodes import FleetNode
from flexlora.clients.setup.first_contact import ask, fetch_authority
from flexlora.commands.cli import main
from flexlora.deploy.invitation import Token
from flexlora.deploy.node_keys import make_node_keys
from flexlora.errors import UserError
from flexlora.server.init import server_init
from flexlora.simulations.benchmarks.fleet_connection import FleetRefused
from flexlora.simulations.benchmarks.fleet_running import RunningFleet
from init_folders import free_ports
from paths import ROOT

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin"), reason="no nginx"
    ),
]
NODES = 50  # that are enrolled
RUNNING = int(os.environ.get("FLEXLORA_TEST_FLEET", "8"))  # of them take part in the run
TARGETS = "q_proj"
SMALL = {
    "num-server-rounds": 1,
    "fraction-train": 1.0,
    "ranks.tiers": "2",
    "ranks.shares": "equal",
    "lora.target-modules": TARGETS,
    "eval.every": 0,
    "server.round-timeout-seconds": 600.0,
    "server.wait-seconds": 600.0,
}
READY = {
    "superlink": "Uvicorn running on",
    "proxy": "start worker process",
    "enrolment": "Uvicorn running on",
    "serverapps": "Starting Flower SuperExec",
}


class Server:
    """A server folder whose four processes run, by the scripts that are in it."""

    def __init__(self, place):
        self.place, self.folder, self.port = place, place / "server", free_ports(3)
        server_init(folder=str(self.folder), host=["localhost"], port=self.port)
        self.environment = {**os.environ, **QUIET, **ONE_THREAD, "PYTHONUNBUFFERED": "1"}
        self.processes = {}

    def start(self, *names):
        for name in names:
            with self.log(name).open("w") as out:
                self.processes[name] = subprocess.Popen(
                    [self.folder / "bin" / f"start-{name}"],
                    stdout=out,
                    stderr=out,
                    env=self.environment,
                    start_new_session=True,
                )
        for name in names:
            said = lambda name=name: READY[name] in self.log(name).read_text()  # noqa: E731
            until(said, SLOWLY, lambda name=name: tail(self.log(name)))

    def log(self, name):
        return self.place / f"{name}.log"

    def close(self):
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        waited = [psutil.Process(p.pid) for p in self.processes.values() if p.poll() is None]
        for left in psutil.wait_procs(waited, timeout=30)[1]:
            os.killpg(left.pid, signal.SIGKILL)

    def fleet(self, *words):
        """``flexlora fleet WORDS``: its exit status."""
        return main(["fleet", *map(str, words), "--server", str(self.folder)])

    def rows(self, capsys):
        """``fleet list --json`` by name; of a name with two keys both."""
        capsys.readouterr()
        assert self.fleet("list", "--json") == 0
        observed = json.loads(capsys.readouterr().out)
        found = {}
        for row in observed["nodes"]:
            found.setdefault(row["name"], []).append(row)
        return found

    def trust(self):
        return ssl.create_default_context(cafile=str(self.folder / "ca.crt"))

    def node(self, folder, **report):
        address = f"localhost:{self.port}"
        return FleetNode(address, folder, tls=self.trust(), targets=TARGETS, report=report)


@pytest.fixture(scope="module")
def server():
    place = Path(tempfile.mkdtemp(prefix="flx-", dir="/tmp"))
    own = Server(place)
    app = own.folder / "app" / "pyproject.toml"
    table = tomllib.loads(app.read_text())
    config = table["tool"]["flwr"]["app"]["config"]
    for key, value in (SMALL | {"server.min-nodes": RUNNING}).items():
        where, _, leaf = key.rpartition(".")
        (config[where] if where else config)[leaf] = value
    app.write_text(tomli_w.dumps(table))
    try:
        own.start(*READY)
        yield own
    finally:
        own.close()
        shutil.rmtree(place)


@pytest.fixture(scope="module")
def enrolled(server):
    """Fifty folders, by the script of ``examples/`` and one inventory; the script's output."""
    stub = server.place / "flexlora"
    program = ROOT / "tests" / "support" / "stub_enrolment.py"
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    stub.chmod(0o755)
    names = [f"site-{k:02d}" for k in range(1, NODES + 1)]
    inventory = server.place / "fleet.toml"
    nodes = [{"name": name, "folder": str(server.place / "nodes" / name)} for name in names]
    inventory.write_text(
        tomli_w.dumps({"defaults": {"flexlora": str(stub), "data": "/none"}, "node": nodes})
    )
    script = [sys.executable, ROOT / "examples" / "enroll_fleet.py", inventory]
    words = ["--server", server.folder, "--transport", "sh -c", "--parallel", "4"]
    done = subprocess.run(
        [*script, *words], env=server.environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr + tail(server.log("enrolment"))
    return done.stdout, {name: server.place / "nodes" / name for name in names}


def test_one_script_enrols_fifty_nodes_and_the_token_is_used_up(server, enrolled, capsys):
    said, folders = enrolled
    assert said.splitlines()[-1] == f"{NODES} enrolled, 0 failed."
    rows = server.rows(capsys)
    assert set(rows) == set(folders)
    assert {row["state"] for (row,) in rows.values()} == {"registered"}
    assert len({row["key"] for (row,) in rows.values()}) == NODES
    for folder in folders.values():
        assert (folder / "ca.crt").read_bytes() == (server.folder / "ca.crt").read_bytes()
    stored = json.loads((server.folder / "nodes" / "invitations.json").read_text())
    assert [len(row["used"]) for row in stored["invitations"]] == [NODES]


def test_a_token_of_another_authority_sends_nothing(server, capsys):
    assert server.fleet("invite") == 0
    token = Token.parse(capsys.readouterr().out)
    with pytest.raises(
        UserError, match=r"another authority than the token names.*Nothing was sent"
    ):
        fetch_authority(replace(token, authority=bytes(32)))
    authority = fetch_authority(token)
    with pytest.raises(UserError, match="the token's secret is wrong"):
        ask(replace(token, secret=bytes(24)), authority)
    assert "refused: the token's secret is wrong" in server.log("enrolment").read_text()
    assert ask(token, authority).state == "welcome"


def test_a_run_of_the_fleet_and_what_the_operator_sees(server, enrolled, capsys):
    _, folders = enrolled
    major, minor, *_ = flexlora.__version__.split(".")
    newer, newest = f"{major}.{int(minor) + 1}.0", f"{major}.{int(minor) + 2}.0"
    reports = {
        "site-01": {"client_id": "site-02"},
        "site-03": {"version": newer},
        "site-04": {"version": newest},
    }
    taken = list(folders.items())[:RUNNING]
    nodes = [server.node(folder, **reports.get(name, {})) for name, folder in taken]
    with RunningFleet(nodes, spread_seconds=3.0) as fleet:
        fleet.entered(SLOWLY)
        command = ["flwr", "run", server.folder / "app", "flexlora", "--stream"]
        environment = {**server.environment, "FLWR_HOME": str(server.folder / "flwr")}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        said = done.stdout + done.stderr + tail(server.log("serverapps"))
        runs = list((server.folder / "state" / "serverapp" / "runs").glob("*"))
        assert len(runs) == 1, said
        run = runs[0]
        rows = {row["client_id"]: row for row in client_rows(run)}
        assert rows["site-03"]["status"] == "ok", said
        assert rows["site-02"]["status"] == "ok"
        liar = "(key of site-01) says it is site-02: left out"
        assert rows["site-01"]["status"] == "left out" and liar in rows["site-01"]["cause"]
        assert liar in rows["site-02"]["cause"]
        assert f"FlexLoRA {newest}, the server has" in rows["site-04"]["cause"]
        assert sum(row["status"] == "ok" for row in rows.values()) == RUNNING - 2
        listed = server.rows(capsys)
        online = [name for name, (row,) in listed.items() if row["state"] == "online"]
        assert online == [name for name, _ in taken]
        assert liar in listed["site-01"][0]["why"]
        (third,) = listed["site-03"]
        assert (third["version"], third["rank_class"]) == (newer, "rank_2")
        assert third["last_reply"].startswith("20") and third["last_seen"].startswith("20")
        _revoke(server, folders["site-05"], fleet, capsys)
    _rotate(server, folders["site-06"], capsys)


def _revoke(server, folder, fleet, capsys):
    """Its next request is refused, and so is its next start; the list says who tried."""
    assert server.fleet("revoke", folder.name, "site5") == 2
    assert "no node is named 'site5'. Did you mean 'site-" in capsys.readouterr().out
    (node,) = [node for node in fleet.nodes if node.name == folder.name]
    until(lambda: node.refusals, SLOWLY, lambda: "the revoked node goes on")
    with (
        pytest.raises(FleetRefused, match="activate-node: HTTP 412"),
        RunningFleet([server.node(folder)]) as again,
    ):
        again.entered(SLOWLY)
    (row,) = server.rows(capsys)[folder.name]
    assert row["state"] == "revoked" and "tried to connect once, last on 20" in row["why"]


def _rotate(server, folder, capsys):
    """Both keys are admitted until the new one has been seen."""
    keys = make_node_keys(folder.name)
    new = server.place / folder.name
    (new / "keys").mkdir(parents=True)
    (new / "keys" / "node").write_bytes(keys.private)
    (new / "keys" / "node.pub").write_bytes(keys.public)
    assert server.fleet("rotate", folder.name, new / "keys" / "node.pub") == 0
    with RunningFleet([server.node(folder)]) as before:
        before.entered(SLOWLY)
    assert [row["state"] for row in server.rows(capsys)[folder.name]] == ["offline", "registered"]
    with RunningFleet([server.node(new)]) as after:
        after.entered(SLOWLY)
        (row,) = server.rows(capsys)[folder.name]
        assert row["state"] == "online"
    with pytest.raises(FleetRefused, match="HTTP 412"), RunningFleet([server.node(folder)]) as old:
        old.entered(SLOWLY)
