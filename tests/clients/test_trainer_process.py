"""``flexlora client serve`` as a process: signals, restarts, refusals, a real Flower node."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from federation import ONE_THREAD, ROOT, client_rows, command, finished, rounds, small
from flexlora.clients.trainer.command import Signals
from flexlora.clients.trainer.sockets import connection_error
from flexlora.commands.cli import main
from flexlora.simulations.benchmarks import resident as benchmark
from paths import SUPPORT
from trainers import asked, context_of, run_config, train_message, values_of, write_rows

BIN = Path(sys.executable).parent


@pytest.fixture
def place(tmp_path):
    """A data folder, a place for replies and a path short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="flx-"))
    write_rows(tmp_path / "data")
    yield {"data": tmp_path / "data", "state": tmp_path / "kept", "socket": folder / "s"}
    shutil.rmtree(folder)


def arguments(place, *more):
    named = [word for key, value in place.items() for word in (f"--{key}", value)]
    return ["client", "serve", "--model", "embedded", "--set", "engine.threads=1", *named, *more]


def serving(place, *more):
    """A trainer's process, once it listens."""
    process = command(*arguments(place, *more))
    deadline = time.monotonic() + 600
    while connection_error(place["socket"]):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.1)
    return process


def ask(place, config):
    node = {"trainer_socket": str(place["socket"]), "client_id": "site"}
    return asked(train_message(config), context_of(config, **node))


@pytest.mark.slow
def test_what_was_trained_outlasts_a_kill_and_sigterm_leaves_no_socket(place, capsys):
    config = run_config()
    process = serving(place)
    first = ask(place, config)
    assert main(["client", "health", "--socket", str(place["socket"])]) == 0
    printed = capsys.readouterr().out
    for words in ("now      idle", "1 trained, 0 evaluated, 0 from disk", "1 replies", "nf4"):
        assert words in printed
    process.kill()
    process.communicate()
    assert place["socket"].exists() and connection_error(place["socket"])

    process = serving(place)
    assert values_of(ask(place, config)) == values_of(first)
    process.send_signal(signal.SIGTERM)
    status, out, err = finished(process)
    assert (status, err) == (0, "") and not place["socket"].exists()
    assert "answered from disk" in out and "\x1b" not in out
    assert out.splitlines()[-1].endswith("stopped") and "train, run 7, round 1" in out


@pytest.mark.slow
def test_sigterm_aborts_a_training_that_outlasts_its_grace(place):
    config = run_config(train__max_steps=100_000)
    process = serving(place, "--grace", "0.5")
    asking = subprocess.Popen(
        [sys.executable, "-c", ASK, str(place["socket"])],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(SUPPORT)},
    )
    try:
        deadline = time.monotonic() + 300
        while "train, run 7" not in _doing(place) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        status, out, _ = finished(process)
        assert status == 1 and "what was in flight is aborted" in out
        assert not place["socket"].exists()
        assert "went away while it was asked" in asking.communicate(timeout=300)[0]
    finally:
        asking.kill()
    assert not list(place["state"].glob("*.reply*")) and config.train.max_steps == 100_000


ASK = """
import sys
from pathlib import Path
from trainers import asked, context_of, run_config, train_message
config = run_config(train__max_steps=100_000)
node = {"trainer_socket": sys.argv[1], "client_id": "site"}
print(asked(train_message(config), context_of(config, **node))["report"]["cause"])
"""


def _doing(place):
    from flexlora.clients.trainer.client import health

    return health(place["socket"]).doing


REFUSED = {
    "no data": (["--data", "/nowhere"], "'/nowhere'"),
    "no model": (["--model", "./nothing"], "'./nothing', which is not a folder"),
    "too large": (["--memory-limit", "1MB"], "does not fit 1,000,000 bytes: at rank 1"),
    "no size": (["--memory-limit", "much"], "--memory-limit is 'much', expected a number and a"),
    "a run's key": (["--set", "train.max-steps=3"], "'train.max-steps', which is not the node's"),
    "no group": (["--group", "no-such-group"], "--group is 'no-such-group', which is not a group"),
    "no such kind": (["--quantization", "nf5"], "model.quantization is 'nf5', expected one of"),
    "no time": (["--grace", "-1"], "--grace is -1, expected 0 or more"),
    "an open folder": (["--socket", "/tmp/s"], r"others may write in '/tmp' (mode 1777)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_is_one_sentence_and_status_2(place, capsys, what):
    more, words = REFUSED[what]
    assert main([str(word) for word in arguments(place, *more)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1
    assert not place["socket"].exists()


def test_signals_at_once_are_one_wish_and_a_later_one_is_another(monkeypatch):
    signals, clock = Signals(), [10.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    signals(signal.SIGTERM)
    signals(signal.SIGTERM)
    assert signals.stop.is_set() and not signals.now.is_set()
    clock[0] += 1.5
    signals(signal.SIGTERM)
    assert signals.now.is_set()


def test_health_of_nobody_is_one_sentence_and_status_2(place, capsys):
    assert main(["client", "health", "--socket", str(place["socket"])]) == 2
    assert "cannot be reached: there is no such socket" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.nightly
def test_the_benchmark_finds_the_same_numbers_without_torch_in_the_client_app(tmp_path):
    """How much faster is the benchmark's to say: no time is tested."""
    rows = benchmark.main(["--rounds", "1", "--steps", "1", "--json", str(tmp_path / "rows")])
    assert [row.name for row in rows] == ["query", "train", "evaluate", "train, repeated"]
    assert all(row.error == 0.0 and not row.loads_torch and row.ratio > 0 for row in rows), rows
    assert (tmp_path / "rows").read_text().count('"target": 4.0') == 4


def test_the_benchmark_sees_numbers_that_differ():
    first = {"a": 1.0, "b": float("nan"), "c": "x"}
    assert benchmark.difference(first, dict(first)) == 0.0
    assert benchmark.difference(first, {**first, "a": 1.5}) == 0.5
    for other in ({**first, "c": "y"}, {**first, "a": float("nan")}, {"a": 1.0}):
        assert not benchmark.difference(first, other) < 1e9


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def flower(tmp_path, place):
    """A SuperLink and one SuperNode whose ClientApps have a trainer; all end with the test."""
    home, port = tmp_path / "flwr", free_port()
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    environment = {
        **os.environ,
        **ONE_THREAD,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONWARNINGS": "ignore",
        "NO_COLOR": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    node = f'client-id="site" trainer-socket="{place["socket"]}"'
    here = ["--insecure", "--host", "127.0.0.1", "--port"]
    started = []

    def start(*words):
        log = (tmp_path / f"{words[0]}.log").open("w")
        started.append(
            subprocess.Popen(
                [str(BIN / words[0]), *map(str, words[1:])],
                **{"env": environment, "cwd": tmp_path, "stdout": log, "stderr": log},
                start_new_session=True,
            )
        )

    try:
        start("flower-superlink", *here, port, "--database", home / "state.db")
        deadline = time.monotonic() + 300
        while not _listens(port) and time.monotonic() < deadline:
            time.sleep(0.2)
        superlink = ["--superlink", f"127.0.0.1:{port}", "--node-config", node]
        start("flower-supernode", *here, free_port(), *superlink)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
        _, alive = psutil.wait_procs(_under(home), timeout=60)
        for left in alive:
            left.kill()


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _under(home):
    """Every process that was started under this FLWR_HOME."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_a_real_flower_node_trains_through_its_trainer(place, flower, tmp_path):
    """SuperLink, SuperNode, ``flwr-clientapp`` per message: the node has no data of its own."""
    config = small(clients__count=0, server__min_nodes=1, server__wait_seconds=300.0)
    changed = config.changed()
    changed["out"] = str(tmp_path / "run")
    spelled = " ".join(
        f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
        for key, value in changed.items()
    )
    trainer = serving(place)
    try:
        done = subprocess.run(
            [BIN / "flwr", "run", ROOT, "own", "--stream", "--run-config", spelled],
            **{"env": flower, "cwd": tmp_path, "capture_output": True, "text": True},
            timeout=600,
        )
    finally:
        trainer.send_signal(signal.SIGTERM)
        status, out, _ = finished(trainer)
    assert [row["round"] for row in rounds(tmp_path / "run")] == [0, 1], done.stdout[-2000:]
    (row,) = client_rows(tmp_path / "run", 1)
    assert (row["client_id"], row["status"], row["num_examples"]) == ("site", "ok", "12")
    kinds = [line.split()[1].rstrip(",") for line in out.splitlines() if ", run " in line]
    assert kinds == ["query", "evaluate", "train", "evaluate"] and status == 0
