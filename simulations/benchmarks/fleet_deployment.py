"""A server as a deployment has it, each part a process of its own, on loopback.

``flower-superlink`` with ``--database`` and ``--isolation process``, ``flower-superexec``, which
starts the ServerApp as its child, and ``flwr run`` with an app that holds no code, as
``flexlora server init`` lays them out. Whatever was started ends with the block.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import tomli_w

from flexlora.config.resolve import Config, flower_table
from flexlora.deploy.certificates import make_authority, make_server
from flexlora.simulations.benchmarks.cohort_peers.flower import BIN, QUIET

__all__ = ["Server", "free_port"]

START_SECONDS, STOP_SECONDS, SUBMIT_SECONDS = 120.0, 15.0, 300.0
LINK = '[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "{address}"\n{trust}\n'
PEAK = "VmHWM:"
MARK = "FLEXLORA_BENCHMARK_HOME"  # in the environment of whatever is started


class Server:
    """SuperLink and SuperExec below ``home``, their processor seconds and memory.

    Args:
        tls: with an authority and a certificate for loopback; ``ca.crt`` is for the nodes.
        stored: keep messages and runs in a database file; else in the SuperLink's memory.
    """

    def __init__(self, home: Path, *, tls: bool, stored: bool = True) -> None:
        self.home, self.tls, self.stored = home, tls, stored
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.database = home / "superlink.db"
        self.peaks = {"superlink": 0, "serverapp": 0}
        self.seconds = {"superlink": 0.0, "serverapp": 0.0}
        self.ended = ""  # which process, where one has ended before its time
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **QUIET, "FLWR_HOME": str(home / "flwr"), "PATH": path}
        self.environment[MARK] = str(home)

    def __enter__(self) -> Server:
        (self.home / "flwr").mkdir()
        trust = "insecure = true"
        arguments = ["--insecure"]
        if self.tls:
            arguments = self._certify()
            trust = f'root-certificates = "{self.home / "ca.crt"}"'
        text = LINK.format(address=self.address, trust=trust)
        (self.home / "flwr" / "config.toml").write_text(text, encoding="utf-8")
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        where += ["--database", str(self.database)] if self.stored else []
        try:
            superlink = ["flower-superlink", *arguments, *where, "--isolation", "process"]
            self.superlink = psutil.Process(self.start(superlink, "superlink").pid)
            self._wait_until_it_listens()
            trusting = ["--root-certificates", str(self.home / "ca.crt")] if self.tls else []
            words = ["--runtime-api-address", self.address, *(trusting or ["--insecure"])]
            self.superexec = psutil.Process(self.start(["flower-superexec", *words], "apps").pid)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # By the mark, since a ServerApp whose SuperExec has died is nobody's child.
        alive = self._marked()
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(alive, timeout=STOP_SECONDS)
        while left := self._marked():
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=STOP_SECONDS)

    def _marked(self) -> list[psutil.Process]:
        """The processes that were started under this home, zombies left out."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.home):
                    found.append(process)
        return found

    def start(
        self, words: Sequence[str], log: str, more: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        """A program of this installation; what it says goes to ``LOG.log``."""
        with (self.home / f"{log}.log").open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                [str(BIN / words[0]), *words[1:]],  # a path stays what it is
                env={**self.environment, **(more or {})},
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        return process

    def submit(self, config: Config) -> None:
        """``flwr run`` of the configuration; the run goes on without it.

        Raises:
            RuntimeError: the run was not accepted.
        """
        app = {
            "project": {"name": "flexlora", "version": "0.0.0", "license": "Apache-2.0"},
            "tool": {
                "flwr": {
                    "app": {
                        "publisher": "flexlora",
                        "fab-include": ["pyproject.toml"],
                        "components": {
                            "serverapp": "flexlora.server.app:app",
                            "clientapp": "flexlora.clients.app:app",
                        },
                        "config": flower_table(),
                    }
                }
            },
        }
        (self.home / "app").mkdir()
        (self.home / "app" / "pyproject.toml").write_bytes(tomli_w.dumps(app).encode())
        pairs = (f"{key}={json.dumps(value)}" for key, value in config.changed().items())
        spelled = ["--run-config", " ".join(pairs)]
        process = self.start(["flwr", "run", str(self.home / "app"), "own", *spelled], "run")
        if process.wait(SUBMIT_SECONDS):
            raise RuntimeError(f"`flwr run` failed: {self.said('run')}")

    def said(self, log: str, length: int = 2000) -> str:
        """The end of a log."""
        return (self.home / f"{log}.log").read_text(encoding="utf-8", errors="replace")[-length:]

    def look(self) -> None:
        """Note processor seconds and peaks as of now; what has ended keeps its last ones."""
        found = {"superlink": self.superlink}
        with suppress(psutil.NoSuchProcess):
            for process in self.superexec.children(recursive=True):
                with suppress(psutil.Error):
                    if any("flwr-serverapp" in word for word in process.cmdline()):
                        found["serverapp"] = process
        for name, process in found.items():
            with suppress(psutil.Error, OSError):
                times = process.cpu_times()
                self.seconds[name] = times.user + times.system
                self.peaks[name] = max(self.peaks[name], _peak_bytes(process.pid))
        if self.seconds["serverapp"] and "serverapp" not in found:
            self.ended = "the ServerApp"
        for name, process in (("SuperLink", self.superlink), ("SuperExec", self.superexec)):
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                self.ended = f"the {name}"

    def database_bytes(self) -> int:
        """The database with what SQLite has beside it."""
        return sum(file.stat().st_size for file in self.home.glob(f"{self.database.name}*"))

    def _certify(self) -> list[str]:
        authority = make_authority("FlexLoRA benchmark", days=2)
        server = make_server(authority, [], days=2)
        files = {
            "ca.crt": authority.certificate_pem,
            "server.crt": server.certificate_pem,
            "server.key": server.key_pem,
        }
        for name, content in files.items():
            (self.home / name).write_bytes(content)
        options = zip(("ca-certfile", "certfile", "keyfile"), files, strict=True)
        return [word for key, name in options for word in (f"--ssl-{key}", str(self.home / name))]

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.superlink.is_running() and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the SuperLink does not listen: {self.said('superlink')}")


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(PEAK):
            return int(line.split()[1]) * 1024
    return 0
