"""What the edge does to a federation over TLS: killed nodes, killed servers, nodes that do not fit.

Two SuperLinks side by side, so that the minute after which Flower gives a killed process up is
waited for once. One (``survivor``) has an external SuperExec: in round 1 a SuperNode and another
node's ClientApp are killed, in round 2 the SuperLink. The other (``resumed``) runs its ServerApp
itself: it is killed in round 3, a new ``flwr run`` goes on, and in round 4 a node is lost for good.
Both share the resident trainers; the oracle is the same run, unbroken, in one process.
"""

import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from deployment import SLOWLY, Federation, Processes, once, tail, until, write_clients
from federation import (
    StopAt,
    Stopped,
    client_rows,
    global_delta,
    largest_gap,
    rounds,
    same_bytes,
    small,
)
from flexlora.config.paths import EMBEDDED
from flexlora.runs.folder import RunFolder
from flexlora.simulations.simulate import simulate

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

NAMES = ("north", "south", "west")
PAIR = ("north", "south")
LONG = 2 * SLOWLY  # for what includes the minute that Flower waits


def run_of(**changes):
    """A training of some seconds, so that there is a middle to kill it in."""
    return small(
        method__name="carried",
        clients__count=0,
        train__max_steps=100,
        eval__max_examples=4,
        eval__every=0,
        server__wait_seconds=float(SLOWLY),
        **changes,
    )


SURVIVOR = {
    "num_server_rounds": 3,
    "server__quorum": 3,
    "server__round_timeout_seconds": float(LONG),
    "server__silence_seconds": 90.0,  # a reply that dies with the SuperLink is only missed
}
RESUMED = {
    "num_server_rounds": 4,
    "server__quorum": 2,
    "server__silence_seconds": 2.0,
    "server__skipped_rounds": 0,
    "server__resends": 1,
    "server__round_timeout_seconds": float(LONG),
}
IMPATIENT = {"server__silence_seconds": 0.0, "server__round_timeout_seconds": 60.0}


def break_and_survive(processes, trainers, data, observed):
    """The SuperLink with an external SuperExec; ``observed`` is filled with what happened when."""
    federation = Federation(processes, "survivor", isolation="process").ready()
    federation.register(*NAMES, "base")
    for name in PAIR:
        federation.start(name, trainer_socket=trainers[name].ready().path)
    federation.start("west", data_path=data / "west")
    start_node_of_another_base(federation, data)
    run = federation.run("run", run_of(**SURVIVOR, server__min_nodes=4))
    observed["run"] = str(run.folder)
    train = f"train, run {run.id}"
    until(lambda: trainers["south"].doing(f"{train}, round 1"), LONG, federation.logs)
    observed["node killed"] = federation.nodes["south"].kill()
    observed["client app killed"] = kill_client_app(federation, "west")
    observed["strangers"] = turn_away_strangers(federation)
    run.closed(1, LONG, federation.logs)
    observed["round 1"] = time.monotonic()
    observed["node ended"] = federation.nodes["south"].ended
    observed["node ids"] = re.findall(
        r"SuperNode ID: (\d+)", federation.nodes["south"].log.read_text()
    )
    until(lambda: trainers["north"].doing(f"{train}, round 2"), LONG, federation.logs)
    observed["superlink killed"] = federation.superlink.kill()
    run.closed(2, LONG, federation.logs)
    observed["round 2"] = time.monotonic()
    run.finished(3, LONG, federation.logs)
    observed["superlinks"] = federation.superlink.ended
    observed["statuses"] = list(ended_runs(federation).values())


def ended_runs(federation):
    """How each run ended, by its id; its folder is whole a moment before Flower says so."""

    def ended():
        runs = {listed["run-id"]: listed["status"] for listed in federation.flwr("list")["runs"]}
        return runs if all(status.startswith("finished") for status in runs.values()) else None

    return until(ended, LONG, federation.logs)


def start_node_of_another_base(federation, data):
    """Its weights differ, so its fingerprint does."""
    other = federation.folder / "other-base"
    shutil.copytree(EMBEDDED, other)
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    federation.start("base", data_path=data / "west", model_path=other)


def kill_client_app(federation, name):
    """SIGKILL for the ClientApp of a node once it holds the base and a train message of round 1."""
    log = federation.nodes[name].log

    def at_work():
        if not re.search(r"ROUND 1\].*?Receiving: train message", tail(log, 10**6), re.DOTALL):
            return None
        apps = [
            p for p in federation.processes_of(name) if "flwr-clientapp" in " ".join(p.cmdline())
        ]
        newest = max(apps, key=lambda process: process.create_time(), default=None)
        return newest if newest and newest.memory_info().rss > 3e8 else None

    until(at_work, LONG, federation.logs).kill()
    return time.monotonic()


def turn_away_strangers(federation):
    """What becomes of a node that nobody registered, and of one that trusts another CA."""
    attempts = {
        "unregistered": federation.supernode("unregistered"),
        "other CA": federation.supernode("other", ca=federation.folder / "stranger.pem"),
    }
    started = {}
    for name, words in attempts.items():
        log = federation.folder / f"{name}.log"
        home = federation.folder / name
        started[name] = (federation.processes.start(words, log, home), log)
    return {
        name: [process.wait(SLOWLY), log.read_text()] for name, (process, log) in started.items()
    }


def break_and_resume(processes, trainers, observed):
    """The SuperLink that runs its ServerApp itself: killed, resumed, then left by a node."""
    federation = Federation(processes, "resumed", isolation="subprocess").ready()
    federation.register(*PAIR)
    for name in PAIR:
        federation.start(name, trainer_socket=trainers[name].ready().path)
    first = federation.run("run", run_of(**RESUMED, server__min_nodes=2))
    observed["run"], observed["first"] = str(first.folder), first.id
    until(lambda: trainers["north"].doing(f"train, run {first.id}, round 3"), LONG, federation.logs)
    federation.superlink.kill()
    observed["before"] = rounds(first.folder)
    until(lambda: not federation.listens(), SLOWLY, federation.logs)
    federation.ready()
    changes = {**RESUMED, **IMPATIENT, "server__min_nodes": 2}
    second = federation.run("again", run_of(**changes, resume=str(first.folder)))
    observed["second"] = second.id
    until(
        lambda: trainers["south"].doing(f"train, run {second.id}, round 4"), LONG, federation.logs
    )
    federation.lose("south")
    observed["after 3"] = keep_delta(first.folder, federation.folder / "after 3")
    second.finished(4, LONG, federation.logs)
    observed["statuses"] = ended_runs(federation)


def keep_delta(run, folder):
    """A copy of the checkpoint as it is now."""
    shutil.copytree(run / "checkpoint", folder / "checkpoint")
    return str(folder)


def unbroken(folder, data):
    """Both runs in one process: all three clients to the end, and the pair until round 3."""
    rows, one = {"data__path": str(data / "all")}, {"engine__cohort_size": 1}
    simulate(run_of(**SURVIVOR, **rows, **one), folder / "survivor")
    with pytest.raises(Stopped):
        pair = {"data__path": str(data / "pair" / "all")}
        simulate(
            run_of(**RESUMED, **pair, **one),
            folder / "resumed",
            observer=StopAt("round_finished", 3),
        )


def break_things(folder):
    """Both federations at once, each in a thread that only waits; the oracles meanwhile."""
    data = write_clients(folder / "data", NAMES)
    write_clients(folder / "data" / "pair", PAIR)
    observed = {"survivor": {}, "resumed": {}}
    with Processes(folder) as processes:
        trainers = {name: processes.trainer(name, data / name) for name in PAIR}
        with Waiting() as waiting:
            waiting.on(break_and_survive, processes, trainers, data, observed["survivor"])
            waiting.on(break_and_resume, processes, trainers, observed["resumed"])
            unbroken(folder / "unbroken", data)
    observed["trainers"] = {name: trainer.log.read_text() for name, trainer in trainers.items()}
    return observed | {"unbroken": str(folder / "unbroken")}


class Waiting:
    """Threads whose first failure is the block's."""

    def __init__(self):
        self._threads, self._failed = [], []

    def on(self, function, *arguments):
        thread = threading.Thread(target=self._run, args=(function, *arguments), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, function, *arguments):
        try:
            function(*arguments)
        except BaseException as error:
            self._failed.append(error)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        while kind is None and not self._failed and any(t.is_alive() for t in self._threads):
            time.sleep(0.2)
        if kind is None and self._failed:
            raise self._failed[0]


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    return once(tmp_path_factory, "faults", break_things)


def rows_of(observed, name, server_round):
    return {row["client_id"]: row for row in client_rows(observed[name]["run"], server_round)}


def test_a_killed_supernode_is_started_again_and_its_round_completes(observed):
    """Flower refuses it until it has given the old one up; then it has the same id."""
    row = rows_of(observed, "survivor", 1)["south"]
    assert row["status"] == "ok" and "sent 2 times" in row["cause"]
    closed = observed["survivor"]["round 1"]
    first, *refused = [s for when, s in observed["survivor"]["node ended"] if when < closed]
    assert first == -9 and refused and set(refused) == {1}
    first, *later = observed["survivor"]["node ids"]
    assert later == [first] * len(later) and later


def test_a_killed_client_app_is_given_up_and_its_round_completes(observed):
    row = rows_of(observed, "survivor", 1)["west"]
    assert row["status"] == "ok" and "sent 2 times" in row["cause"]
    assert observed["survivor"]["client app killed"] < observed["survivor"]["round 1"]
    assert rounds(observed["survivor"]["run"])[1]["clients_ok"] == 3


def test_a_run_outlives_its_superlink(observed):
    assert observed["survivor"]["superlinks"][0][1] == -9
    assert (
        observed["survivor"]["round 1"]
        < observed["survivor"]["superlink killed"]
        < observed["survivor"]["round 2"]
    )
    assert [row["round"] for row in rounds(observed["survivor"]["run"])] == [0, 1, 2, 3]
    assert observed["survivor"]["statuses"] == ["finished:completed"]


def test_what_was_learned_is_what_an_unbroken_run_learns(observed):
    broken, unbroken = Path(observed["survivor"]["run"]), Path(observed["unbroken"]) / "survivor"
    assert largest_gap(global_delta(broken), global_delta(unbroken)) < 1e-3
    for ours, theirs in zip(rounds(broken), rounds(unbroken), strict=True):
        assert ours.get("clients_ok") == theirs.get("clients_ok")
        if "eval_loss" in theirs:
            assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-4)


def test_a_node_of_another_base_is_left_out_with_its_cause(observed):
    rows = client_rows(observed["survivor"]["run"], 0)
    ((name, cause),) = [(r["client_id"], r["cause"]) for r in rows if r["status"] == "left out"]
    assert name == "base" and re.search("another base model .*fingerprint", cause)


def test_a_node_that_nobody_registered_is_turned_away(observed):
    status, log = observed["survivor"]["strangers"]["unregistered"]
    assert status != 0 and "Failed to initialize the connection" in log


def test_a_node_that_trusts_another_ca_says_so_and_ends(observed):
    status, log = observed["survivor"]["strangers"]["other CA"]
    assert status != 0 and re.search("certificate verify failed", log, re.IGNORECASE)


def test_a_killed_server_loses_no_finished_round_and_the_run_is_resumed(observed):
    kept = rounds(observed["resumed"]["run"])
    assert [row["round"] for row in observed["resumed"]["before"]] == [0, 1, 2]
    assert kept[:3] == observed["resumed"]["before"]
    assert [row["round"] for row in kept] == [0, 1, 2, 3, 4]
    assert observed["resumed"]["statuses"][observed["resumed"]["second"]] == "finished:completed"


def change_after_3(folder):
    state, _ = RunFolder(folder).load_checkpoint()
    assert state.round == 3
    return {name: state.change.delta_weight(name) for name in state.change}


def test_the_resumed_run_learned_what_an_unbroken_one_learns(observed):
    broken = change_after_3(observed["resumed"]["after 3"])
    assert largest_gap(broken, change_after_3(Path(observed["unbroken"]) / "resumed")) < 1e-3


def test_a_round_without_quorum_leaves_the_global_adapter_unchanged(observed):
    last = rounds(observed["resumed"]["run"])[-1]
    assert last["clients_ok"] < 2 and "server.quorum is 2" in last["skipped"]
    rows = {row["client_id"]: row for row in client_rows(observed["resumed"]["run"], 4)}
    assert rows["south"]["status"] == "failed" and rows["south"]["cause"]
    before, after = (
        RunFolder(observed["resumed"][name]).load_checkpoint()[0] for name in ("after 3", "run")
    )
    assert (before.round, after.round) == (3, 4) and same_bytes(before, after)


def test_a_reply_that_comes_twice_counts_once(observed):
    """Silence of two seconds: every message goes out again while its first copy is trained."""
    assert sum(row.get("resent", 0) for row in observed["resumed"]["before"]) >= 2
    for server_round in (1, 2):
        rows = client_rows(observed["resumed"]["run"], server_round)
        assert sorted(row["client_id"] for row in rows if row["status"] == "ok") == sorted(PAIR)
        assert rounds(observed["resumed"]["run"])[server_round]["clients_ok"] == 2
    for log in observed["trainers"].values():
        assert re.search(rf"train, run {observed['resumed']['first']}, .*answered from disk", log)
