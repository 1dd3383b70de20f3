"""Real processes under our supervisors, and what goes wrong between rounds and in them.

One SuperLink behind a proxy that can answer 500, two supervised SuperNodes with resident trainers,
and a third SuperNode that nobody starts apps for. In round 1 the proxy answers 500 for 12 seconds;
in round 2 another process holds the lock of the SuperLink's database, and a trainer and the other
node's SuperNode are killed.
"""

from __future__ import annotations

import re
import signal
import sqlite3
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest

from deployment import NODE, SLOWLY, Federation, Processes, once, tail, until, write_clients
from failing_proxy import FailingProxy
from federation import client_rows, rounds, small

pytestmark = pytest.mark.slow

PAIR = ("north", "south")
WAIT_SECONDS = 60.0  # a killed SuperNode may be away half of it once the server has missed it
ERROR_SECONDS = 12.0
LOCK_SECONDS = 8.0  # Flower's own patience is 5
LONG = 2 * SLOWLY
FLEXLORA = (sys.executable, "-m", "flexlora.commands.cli")


class Supervised(Federation):
    """As the folders of ``init`` start it; the nodes reach the SuperLink by a proxy."""

    def _superlink_words(self):
        flower = super()._superlink_words()[1:]
        return [*FLEXLORA, "server", "supervise", "--", "flower-superlink", *flower]

    def node(self, name, proxy, **node_config):
        words = self.supernode(name, **node_config)
        words[words.index(f"127.0.0.1:{self.port}")] = f"127.0.0.1:{proxy.port}"
        log = self.folder / f"node-{name}.log"
        words = [*FLEXLORA, "client", "supervise", "--", "flower-supernode", *words[1:]]
        self.processes.start(words, log, self.folder / name, **{NODE: name})
        until(lambda: "SuperNode ID" in tail(log), SLOWLY, lambda: tail(log))
        return log


def run_of(federation):
    config = small(
        method__name="carried",
        clients__count=0,
        num_server_rounds=2,
        train__max_steps=60,
        eval__max_examples=2,
        eval__every=0,
        server__min_nodes=3,
        server__quorum=2,
        server__wait_seconds=WAIT_SECONDS,
        server__round_timeout_seconds=float(LONG),
    )
    return federation.run("run", config)


def supernode_of(processes, name):
    """The SuperNode that runs now, a child of its supervisor."""
    for process in processes.marked(name):
        with suppress(psutil.Error):
            if process.cmdline()[1:4] == ["-m", "flexlora.clients.supervise", "flower-supernode"]:
                return process
    return None


def hold_the_lock(database, seconds, held):
    """As a process that writes for long: nobody else writes meanwhile."""
    with sqlite3.connect(database, timeout=60) as connection:
        connection.execute("BEGIN IMMEDIATE")
        held.set()
        time.sleep(seconds)
        connection.rollback()


def break_things(folder):
    data, observed = write_clients(folder / "data", PAIR), {}
    with Processes(folder) as processes:
        trainers = {name: processes.trainer(name, data / name) for name in PAIR}
        federation = Supervised(processes, "own", isolation="subprocess").ready()
        federation.register(*PAIR, "idle")
        with FailingProxy(federation.folder, federation.port) as proxy:
            logs = {
                name: federation.node(name, proxy, trainer_socket=trainers[name].ready().path)
                for name in PAIR
            }
            words = federation.supernode("idle", trainer_socket="/nowhere")
            words += ["--isolation", "process"]  # and no SuperExec
            log = federation.folder / "node-idle.log"
            processes.start(words, log, federation.folder / "idle")
            until(lambda: "SuperNode ID" in tail(log), SLOWLY, lambda: tail(log))
            observed["idle"] = re.search(r"SuperNode ID: (\d+)", log.read_text())[1]
            first = {name: supernode_of(processes, name).pid for name in PAIR}
            run = run_of(federation)
            observed["run"] = str(run.folder)

            def training(name, server_round):
                what = f"train, run {run.id}, round {server_round}"
                until(lambda: trainers[name].doing(what), LONG, federation.logs)

            training("south", 1)
            proxy.fail(ERROR_SECONDS)
            run.closed(1, LONG, federation.logs)
            observed["failed"] = dict(proxy.failed)
            observed["same"] = {name: supernode_of(processes, name).pid for name in PAIR} == first

            training("south", 2)
            supernode_of(processes, "north").send_signal(signal.SIGKILL)
            held = threading.Event()
            arguments = (federation.home / "state.db", LOCK_SECONDS, held)
            threading.Thread(target=hold_the_lock, args=arguments).start()
            assert held.wait(60)
            trainers["south"].process.kill()
            trainers["south"].process.wait()
            trainers["south"] = processes.trainer("south", data / "south")
            run.finished(2, LONG, federation.logs)
            back = lambda: logs["north"].read_text().count("SuperNode ID") == 2  # noqa: E731
            until(back, LONG, federation.logs)
            observed["log"] = run.log.read_text()
        observed["nodes"] = {name: log.read_text() for name, log in logs.items()}
        observed["superlink"] = federation.superlink.log.read_text()
        observed["trainer"] = trainers["south"].log.read_text()
    return observed


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    return once(tmp_path_factory, "supervised", break_things)


def rows_of(observed, server_round):
    return {row["client_id"]: row for row in client_rows(observed["run"], server_round)}


def test_a_server_that_answers_500_for_12_seconds_costs_no_node_and_no_update(observed):
    assert sum(observed["failed"].values()) >= 2, observed["failed"]
    assert observed["same"], "both SuperNodes live on"
    assert {name: rows_of(observed, 1)[name]["status"] for name in PAIR} == dict.fromkeys(
        PAIR, "ok"
    )
    assert any("by an error (500); it is asked again" in log for log in observed["nodes"].values())


def test_a_locked_database_is_waited_for(observed):
    assert "database is locked" not in observed["superlink"]


def test_a_trainer_killed_in_training_costs_the_round_no_update(observed):
    row = rows_of(observed, 2)["south"]
    assert row["status"] == "ok" and rows_of(observed, 2)["north"]["status"] == "ok"
    assert re.search(r"sent 2 times \(the trainer on '.*' went away", row["cause"])
    assert "round 2" in observed["trainer"], "the second trainer has trained it"


def test_a_killed_supernode_is_started_again_and_its_round_completes(observed):
    assert "flower-supernode ended (SIGKILL)" in observed["nodes"]["north"]
    assert observed["nodes"]["north"].count("SuperNode ID") == 2
    assert {name: rows_of(observed, 2)[name]["status"] for name in PAIR} == dict.fromkeys(
        PAIR, "ok"
    )


def test_a_node_without_client_apps_is_named_and_waited_for_no_longer_than_asked(observed):
    (left_out,) = [row for row in client_rows(observed["run"], 0) if row["status"] == "left out"]
    assert left_out["client_id"] == f"node_{observed['idle']}"
    assert f"no answer to the query within {WAIT_SECONDS:g} s" in left_out["cause"]
    waits = re.findall(
        r"waiting for nodes that have not answered.*: (.*), at most", observed["log"]
    )
    assert waits[-1] == observed["idle"]
    assert [row["clients_ok"] for row in rounds(observed["run"])[1:]] == [2, 2]
