"""A federation of real processes on loopback: TLS, node keys, resident trainers, supervised nodes.

What ``docs/deploy.md`` does on two machines, on one: a CA and a server certificate, a registered
key per node, ``flower-superlink`` with a database, a Flower home per node, and whatever ends is
started again, as systemd's ``Restart=always`` does. Every process carries a mark in its
environment, and all that carry it end with the block.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import trustme

from federation import ONE_THREAD, ROOT
from flexlora.clients.trainer.client import health
from flexlora.clients.trainer.sockets import connection_error
from flexlora.data.tasks import generate_rows
from flexlora.deploy.node_keys import make_node_keys
from flexlora.errors import UserError
from flexlora.runs.folder import RunFolder

BIN = Path(sys.executable).parent
MARK, NODE = "FLEXLORA_TEST_FEDERATION", "FLEXLORA_TEST_NODE"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
    "PYTHONWARNINGS": "ignore",
    "NO_COLOR": "1",
}
TASKS = ("past_tense", "rotate_list", "tallest")  # the base has never seen them
SLOWLY = 300  # seconds for anything to start, on a machine with much other work
PAUSE = 5.0  # seconds before what has ended is started again


def until(condition, seconds, what):
    """Wait for ``condition()`` and return what it gives; ``what()`` tells why it never came."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what()}"
        time.sleep(0.2)
    return found


def tail(path, length=3000):
    """The end of a log, under its name."""
    text = path.read_text(errors="replace") if path.exists() else "(no such file)"
    return f"\n--- {path}:\n{text[-length:]}"


def newer(path, other):
    return path.stat().st_mtime_ns >= other.stat().st_mtime_ns


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def once(tmp_path_factory, name, make):
    """``make(folder)``, ready for JSON: made by the first of several pytest workers, read by all.

    Where the first one failed, its folder is there already, and the others fail at once.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = folder / "made.json"
        if not kept.exists():
            folder.mkdir()
            kept.write_text(json.dumps(make(folder)))
        return json.loads(kept.read_text())


# Certificates, keys and data


def write_certificates(folder):
    """A CA, a server's certificate and key, and the CA of another federation."""
    ca, stranger = trustme.CA(), trustme.CA()
    server = ca.issue_cert("localhost", "127.0.0.1", "::1")
    ca.cert_pem.write_to_path(folder / "ca.pem")
    stranger.cert_pem.write_to_path(folder / "stranger.pem")
    server.cert_chain_pems[0].write_to_path(folder / "server.pem")
    server.private_key_pem.write_to_path(folder / "server.key")


def write_node_key(folder):
    """What ``flexlora client init`` makes for a node: ``key`` and ``key.pub``."""
    keys = make_node_keys(folder.name)
    (folder / "key").write_bytes(keys.private)
    (folder / "key.pub").write_bytes(keys.public)


def write_clients(folder, names, rows=(12, 10, 8)):
    """A data folder for each client, one new task each, and ``all`` with the rows of all."""
    for name, task, count in zip(names, TASKS, rows, strict=False):
        for split in ("train", "validation"):
            for place, more in ((name, {}), ("all", {"client": name})):
                (folder / place).mkdir(parents=True, exist_ok=True)
                with (folder / place / f"{split}.jsonl").open("a", encoding="utf-8") as file:
                    for row in generate_rows(task, split, count, seed=0):
                        words = {k: getattr(row, k) for k in ("instruction", "input", "output")}
                        file.write(json.dumps(words | more) + "\n")
    return folder


# Processes


class Processes:
    """Starts processes under one mark; whatever carries it ends with the block."""

    def __init__(self, folder):
        self.folder = folder
        self.sockets = Path(tempfile.mkdtemp(prefix="flx-"))  # a socket's path must be short
        self._kept, self._over = [], False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._over = True
        for kept in self._kept:
            kept.ending.set()
        alive = self.marked()
        for process in alive:
            with suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(alive, timeout=15)
        while left := self.marked():  # a supervisor may have been about to start one more
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        shutil.rmtree(self.sockets)

    def marked(self, node=None):
        """The processes under this mark, or those of one node."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                known = process.environ()
                if known.get(MARK) == str(self.folder) and node in (None, known.get(NODE)):
                    found.append(process)
        return found

    def start(self, words, log, home, **environment):
        """One process in its Flower home, its words in ``log``; none once the block has ended."""
        assert not self._over, f"{words[0]} was to be started when all was over"
        home.mkdir(parents=True, exist_ok=True)
        known = {**os.environ, **QUIET, **ONE_THREAD, MARK: str(self.folder)}
        known |= {"FLWR_HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        with log.open("a") as file:
            return subprocess.Popen(
                [str(word) for word in words],
                env=known | environment,
                cwd=home,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def keep(self, words, log, home, **environment):
        """One process that is started again whenever it ends."""
        self._kept.append(Kept(lambda: self.start(words, log, home, **environment), log))
        return self._kept[-1]

    def trainer(self, name, data, *more):
        """``flexlora client serve`` over one data folder, once it listens."""
        home, path = self.folder / f"trainer-{name}", self.sockets / name
        words = [
            sys.executable,
            "-m",
            "flexlora.commands.cli",
            "client",
            "serve",
            "--model",
            "embedded",
        ]
        words += ["--data", data, "--socket", path, "--state", home / "kept"]
        log = self.folder / f"trainer-{name}.log"
        return Trainer(
            path, log, self.start([*words, "--set", "engine.threads=1", *more], log, home)
        )


class Kept:
    """A supervised process: who has run, how each ended, and the one that runs now."""

    def __init__(self, start, log):
        self.log, self.ending, self.ended = log, threading.Event(), []
        self._start = start
        self.process = start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while True:
            status = self.process.wait()
            self.ended.append((time.monotonic(), status))
            if self.ending.wait(PAUSE):
                return
            self.process = self._start()

    def kill(self):
        """SIGKILL for this process alone; its supervisor starts it again."""
        self.process.kill()
        return time.monotonic()


class Trainer:
    """A resident trainer that loads or listens."""

    def __init__(self, path, log, process):
        self.path, self.log, self.process = path, log, process

    def ready(self):
        until(lambda: not connection_error(self.path), SLOWLY, lambda: tail(self.log))
        return self

    def doing(self, *words):
        """Whether it works at something that all the words name."""
        try:
            now = health(self.path).doing
        except UserError:
            return False
        return all(word in now for word in words)


class Federation:
    """A SuperLink with TLS and node authentication, and what Flower's command line asks of it."""

    def __init__(self, processes, name, *, isolation):
        self.processes, self.isolation = processes, isolation
        self.folder = processes.folder / name
        self.home, self.port = self.folder / "server", free_port()
        self.home.mkdir(parents=True)
        write_certificates(self.folder)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.ca}"\n'
        )
        self.superlink = processes.keep(
            self._superlink_words(), self.folder / "superlink.log", self.home
        )
        if isolation == "process":
            words = [BIN / "flower-superexec", "--runtime-api-address", f"127.0.0.1:{self.port}"]
            words += ["--root-certificates", self.ca]
            log = self.folder / "superexec.log"
            self.superexec = processes.keep(words, log, self.home)
        self.nodes = {}

    @property
    def ca(self):
        return self.folder / "ca.pem"

    def _superlink_words(self):
        tls = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.pem"}
        return [
            *(BIN / "flower-superlink", "--host", "127.0.0.1", "--port", self.port),
            *(w for k, file in tls.items() for w in (f"--ssl-{k}", self.folder / file)),
            *("--enable-supernode-auth", "--database", self.home / "state.db"),
            *("--isolation", self.isolation),
        ]

    def ready(self):
        """Once the SuperLink listens."""
        until(self.listens, SLOWLY, lambda: tail(self.superlink.log))
        return self

    def listens(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def flwr(self, *words):
        """One call of Flower's command line, to its end: what it printed as JSON."""
        log = self.folder / f"flwr-{words[0]}-{time.monotonic_ns()}.log"
        done = self.processes.start(
            [BIN / "flwr", *words, "own", "--format", "json"], log, self.home
        )
        assert done.wait(SLOWLY) == 0, tail(log)
        text = log.read_text()
        return json.loads(text[text.index("{") :])

    def register(self, *names):
        """A key for each node, known to the SuperLink before the node starts."""
        calls = []
        for name in names:
            self._node_folder(name)
            words = [BIN / "flwr", "supernode", "register", self.folder / name / "key.pub", "own"]
            log = self.folder / f"register-{name}.log"
            calls.append((self.processes.start(words, log, self.home), log))
        for call, log in calls:
            assert call.wait(SLOWLY) == 0, tail(log)

    def _node_folder(self, name):
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            write_node_key(folder)
        return folder

    def supernode(self, name, *, ca=None, **node_config):
        """The words that start a node; ``client-id`` is its name."""
        shown = {"client-id": name, **{k.replace("_", "-"): v for k, v in node_config.items()}}
        return [
            *(BIN / "flower-supernode", "--superlink", f"127.0.0.1:{self.port}"),
            *("--root-certificates", ca or self.ca, "--host", "127.0.0.1", "--port", free_port()),
            *("--auth-supernode-private-key", self._node_folder(name) / "key"),
            *("--node-config", " ".join(f'{key}="{value}"' for key, value in shown.items())),
        ]

    def start(self, name, *, environment=None, **node_config):
        """A registered node under supervision."""
        log, words = self.folder / f"node-{name}.log", self.supernode(name, **node_config)
        more = {NODE: f"{self.folder.name}/{name}", **(environment or {})}
        self.nodes[name] = self.processes.keep(words, log, self.folder / name, **more)
        return self.nodes[name]

    def processes_of(self, name):
        """The SuperNode, its SuperExec and its ClientApps."""
        return self.processes.marked(f"{self.folder.name}/{name}")

    def lose(self, name):
        """A node is gone for good, with everything that ran on it."""
        self.nodes[name].ending.set()
        for process in self.processes_of(name):
            with suppress(psutil.Error):
                process.kill()

    def run(self, name, config):
        """``flwr run --stream`` into the run folder of that name, or into the one it resumes."""
        chosen = config.changed()
        out = chosen.get("resume") or chosen.setdefault("out", str(self.folder / "runs" / name))
        spelled = " ".join(f"{key}={json.dumps(value)}" for key, value in chosen.items())
        log = self.folder / f"run-{name}.log"
        words = [BIN / "flwr", "run", ROOT, "own", "--stream", "--run-config", spelled]
        return Run(Path(out), log, self.processes.start(words, log, self.home))

    def until_over(self, *runs):
        """Once Flower's command line has seen the end of every run."""
        for run in runs:
            until(lambda run=run: run.stream.poll() is not None, SLOWLY, self.logs)

    def logs(self):
        return "".join(tail(path, 1500) for path in sorted(self.folder.glob("*.log")))


class Run:
    """A run in progress and what it leaves."""

    def __init__(self, folder, log, stream):
        self.folder, self.log, self.stream = folder, log, stream

    @property
    def id(self):
        """Flower's number of it, once it has one."""
        found = lambda: re.search(r"started run (\d+)", tail(self.log, 10**6))  # noqa: E731
        return until(found, SLOWLY, lambda: tail(self.log)).group(1)

    def rounds(self):
        """The numbers of the rounds that are closed."""
        return [row["round"] for row in RunFolder(self.folder).metrics()]

    def closed(self, server_round, seconds, logs):
        """Wait until a round is closed, checkpoint included."""
        index = self.folder / "checkpoint" / "current.json"

        def there():
            found = index.is_file() and json.loads(index.read_text())["round"] >= server_round
            return found and server_round in self.rounds()

        return until(there, seconds, logs)

    def finished(self, last_round, seconds, logs):
        """Wait until the last round is closed and its adapters are written."""
        self.closed(last_round, seconds, logs)
        index = self.folder / "checkpoint" / "current.json"
        adapter = self.folder / "adapters" / "global" / "adapter_model.safetensors"
        until(lambda: adapter.is_file() and newer(adapter, index), SLOWLY, logs)
        return self
