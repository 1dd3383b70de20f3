"""The READMEs that ``init`` writes, followed word by word, give a node that trains.

Blocks marked ``bash terminal`` get a terminal of their own, which is ready when it prints what the
README says; ``bash`` blocks are run and must end well; ``text`` blocks are what a person does on
two machines (copying a file), and the test does it here. The system-wide parts are not run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path

import psutil
import pytest
import tomli_w

from federation import ONE_THREAD, SMALL, client_rows, rounds
from flexlora.commands.cli import main
from init_folders import free_ports, remove_proxy_folder, status
from trainers import write_rows

pytestmark = pytest.mark.slow

BLOCK = re.compile(r"^```(\w+)( terminal| system)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
READY = re.compile(r"is ready when it prints `([^`]+)`")


@pytest.fixture
def person():
    """Somebody at work in a folder with a short path (a socket's is bounded); it all ends."""
    folder = Path(tempfile.mkdtemp(prefix="flx-", dir="/tmp"))
    someone = Person(folder)
    try:
        yield someone
    finally:
        _, alive = psutil.wait_procs(someone.leave(), timeout=20)
        for left in alive:
            left.kill()
        shutil.rmtree(folder)
        for port in someone.ports:
            remove_proxy_folder(port)


def steps(readme):
    """``(kind, text, ready)`` of the section on doing it by hand, in its order."""
    text = readme.read_text(encoding="utf-8")
    section = text.split("\n## By hand")[1].split("\n## ")[0]
    found = list(BLOCK.finditer(section))
    assert len(found) >= 4
    for block, following in zip(found, [*found[1:], None], strict=True):
        end = following.start() if following else len(section)
        ready = READY.search(section, block.end(), end)
        yield block[1] + (block[2] or ""), block[3], ready[1] if ready else ""


class Person:
    """Follows a README in terminals whose output is kept."""

    def __init__(self, place):
        self.place, self.terminals, self.ports = place, [], []
        self.environment = {
            **os.environ,
            **ONE_THREAD,
            "FLEXLORA_WALK": str(place),
            # A person's, without a virtual environment; nginx is where it is.
            "PATH": f"/usr/local/bin:/usr/bin:/bin:{Path(shutil.which('nginx') or '/').parent}",
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
        }
        self.environment.pop("VIRTUAL_ENV", None)

    def open(self, text, ready):
        """A terminal; waits until it prints ``ready``."""
        assert ready, f"the README does not say when this is ready:\n{text}"
        log = self.place / f"terminal-{len(self.terminals)}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                ["bash", "-c", text], stdout=out, stderr=out, env=self.environment
            )
        self.terminals.append((process, log))
        deadline = time.monotonic() + 600
        while ready not in log.read_text():
            assert process.poll() is None, f"{text}{log.read_text()}"
            assert time.monotonic() < deadline, f"{text}{log.read_text()}"
            time.sleep(0.2)

    def run(self, text, timeout=900):
        """A command that ends; its output."""
        done = subprocess.run(
            ["bash", "-c", text],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{text}{done.stdout}{done.stderr}{self.shown()}"
        return done.stdout

    def leave(self):
        """Every process of the terminals, and of the apps that these have started, asked to end."""
        found = {process for process in psutil.process_iter() if self._started(process)}
        for process, _ in self.terminals:
            if process.poll() is None:
                found.add(psutil.Process(process.pid))  # nginx empties its environment
        for process in found:
            process.terminate()
        return found

    def _started(self, process):
        try:
            return process.environ().get("FLEXLORA_WALK") == str(self.place)
        except psutil.Error:
            return False

    def shown(self):
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for _, log in self.terminals)

    def follow(self, readme, by_hand):
        """Yields after each block; ``by_hand`` does what is between two machines."""
        for kind, text, ready in steps(readme):
            if kind == "bash terminal":
                self.open(text, ready)
            elif kind == "bash":
                yield text, self.run(text)
            else:
                assert kind == "text", kind
                by_hand(text)


def init_both(place, proxy):
    """Both folders, made by the commands that the walk-through in the repository names."""
    write_rows(place / "rows")
    port, node_port = free_ports(3), free_ports(1)
    server, node = place / "server", place / "node"
    words = ["--host", "localhost", "--host", "127.0.0.1", "--port", str(port), "--proxy", proxy]
    assert main(["server", "init", str(server), *words]) == 0
    shutil.copy(server / "ca.crt", place / "ca.crt")
    words = ["--superlink", f"localhost:{port}", "--root-certificates", str(place / "ca.crt")]
    words += ["--data", str(place / "rows"), "--client-id", "site-a", "--device", "cpu"]
    assert main(["client", "init", str(node), *words, "--port", str(node_port)]) == 0
    return server, node, port


def configure(app):
    """What the README asks for: a few values in the app's own file."""
    table = tomllib.loads(app.read_text())
    config = table["tool"]["flwr"]["app"]["config"]
    for key, value in (SMALL | {"clients.count": 0, "ranks.tiers": "2"}).items():
        where, _, leaf = key.rpartition(".")
        (config[where] if where else config)[leaf] = value
    app.write_text(tomli_w.dumps(table))


@pytest.mark.parametrize(
    "proxy",
    [
        "none",
        pytest.param(
            "nginx",
            marks=[
                pytest.mark.skipif(not shutil.which("nginx"), reason="no nginx here"),
                pytest.mark.nightly,
            ],
        ),
    ],
)
def test_two_readmes_word_by_word_give_a_node_that_trains(person, proxy):
    server, node, port = init_both(person.place, proxy)
    person.ports.append(port)
    seen = {}

    def bring_the_key(text):
        if "resume.toml" in text:  # only after an accident
            return
        assert "/nodes/" in text and "keys/node.pub" in text
        shutil.copy(node / "keys" / "node.pub", server / "nodes" / "site-a.pub")

    configure(server / "app" / "pyproject.toml")
    for text, out in person.follow(server / "README.md", bring_the_key):
        seen[text] = out
        if "fleet add" in text:  # "Now the node's owner starts it, as the README there says"
            seen |= dict(person.follow(node / "README.md", lambda text: None))
    run = server / "state" / "serverapp" / "runs" / "app-0001"
    rows = client_rows(run, 1)
    shown = [(row["client_id"], row["status"], row["cause"]) for row in rows]
    assert shown == [("site-a", "ok", "")], person.shown()
    assert rounds(run)[1]["clients_ok"] == 1
    assert (run / "adapters" / "rank_2" / "adapter_model.safetensors").is_file()
    for command, words in (("fleet add", "is registered"), ("fleet list", "online")):
        assert any(words in out for text, out in seen.items() if command in text), command
    assert any("now      idle" in out for text, out in seen.items() if "client health" in text)
    assert status("GET", port, "/health", server / "ca.crt") == 200
    submitted = status("POST", port, "/v1/control/start-run", server / "ca.crt")
    assert (submitted == 404) == (proxy == "nginx")
