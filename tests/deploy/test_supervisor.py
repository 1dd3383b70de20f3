"""The supervisor with programs of a few lines, and systemd played by a socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from flexlora.deploy.supervisor import Patience, Supervisor, supervise_module
from flexlora.deploy.systemd_notify import Notifier
from flexlora.errors import UserError

QUICK = "silence_seconds=1.0, start_seconds=30.0, stop_seconds=1.0, longest_pause=0.2"
HEAD = f"""
import os, sys, time
from flexlora.deploy.supervisor import Patience, Supervisor
supervisor = Supervisor("it", [sys.executable, "-c", sys.argv[1]], patience=Patience({QUICK}))
sys.exit(supervisor.run())
"""
NOTE = "import os; print('pid', os.getpid(), flush=True)\n"
ALIVE = "from flexlora.deploy.supervised import run_supervised\nimport threading, time\n"
SLEEPS = NOTE + ALIVE + "run_supervised(lambda: time.sleep(600))"
STAYS = "threading.Thread(target=lambda: time.sleep(600)).start()\n"


@pytest.fixture
def supervised(tmp_path):
    """Start a supervisor of a Python text; it ends with the test, as does what it started."""
    started = []

    def start(text, **environment):
        log = tmp_path / f"log-{len(started)}"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", HEAD, text],
                stdout=out,
                stderr=out,
                env={**os.environ, **environment},
            )
        started.append(process)
        return Run(process, log)

    yield start
    for process in started:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()


class Run:
    def __init__(self, process, log):
        self.process, self.log = process, log

    def pids(self):
        return [int(line.split()[1]) for line in self.text().splitlines() if line[:4] == "pid "]

    def text(self):
        return self.log.read_text()

    def until(self, condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


ENDS = {
    "it ends": (NOTE + "raise SystemExit(3)", "it ended (status 3)"),
    "its main loop ends, a thread stays": (
        NOTE + ALIVE + STAYS + "run_supervised(lambda: None)",
        "its main loop has ended; the process ends",
    ),
    "its main loop fails, a thread stays": (
        NOTE + ALIVE + STAYS + "run_supervised(lambda: 1 / 0)",
        "ZeroDivisionError",
    ),
    "a thread dies": (
        NOTE
        + ALIVE
        + "def main():\n threading.Thread(target=lambda: 1 / 0, name='beat').start()\n"
        + " time.sleep(600)\nrun_supervised(main, every_thread=True)",
        "its thread 'beat' has died",
    ),
    "it says that it does not work": (
        NOTE + ALIVE + "run_supervised(lambda: time.sleep(600), trouble=lambda: 'no polls')",
        "no polls; the process ends",
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_program_that_does_not_work_any_more_is_started_again(supervised, case):
    text, said = ENDS[case]
    run = supervised(text)
    run.until(lambda: len(run.pids()) >= 3)
    assert said in run.text() and "it is started again in" in run.text()


def test_a_program_that_is_frozen_is_killed_and_started_again(supervised):
    run = supervised(SLEEPS)
    run.until(run.pids)
    time.sleep(0.5)
    os.kill(run.pids()[0], signal.SIGSTOP)
    run.until(lambda: len(run.pids()) == 2)
    assert "no sign of life for 1 s" in run.text() and "it is killed" in run.text()
    assert gone(run.pids()[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_program_and_what_that_has_started(supervised, number):
    grandchild = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', TEXT])\n"
    text = NOTE + f"TEXT = {NOTE + 'import time; time.sleep(600)'!r}\n" + grandchild
    run = supervised(text + ALIVE + "run_supervised(lambda: time.sleep(600))")
    run.until(lambda: len(run.pids()) == 2)
    run.process.send_signal(number)
    assert run.process.wait(30) == 0
    run.until(lambda: all(gone(pid) for pid in run.pids()))


def test_a_killed_supervisor_takes_its_program_along(supervised):
    run = supervised(SLEEPS)
    run.until(run.pids)
    time.sleep(0.5)
    run.process.kill()
    run.until(lambda: gone(run.pids()[0]))


def test_a_wrong_command_line_is_not_tried_again(supervised):
    run = supervised(NOTE + "raise SystemExit(2)")
    assert run.process.wait(60) == 2 and len(run.pids()) == 1


def test_pauses_grow_until_the_program_settles(monkeypatch):
    supervisor = Supervisor("it", [], environment={}, say=lambda line: None)
    pauses, lives, now = [], [1.0] * 11 + [400.0, 1.0], [0.0]
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def run_once():
        now[0] += lives[len(pauses)]
        return 1

    def wait(seconds):
        pauses.append(seconds)
        supervisor._stopping = len(pauses) == len(lives)

    supervisor._run_once, supervisor._wait = run_once, wait
    assert supervisor.run() == 0
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 1, 2]
    assert sum(pauses[:6]) < 120, "a node that its server takes back after a minute is back in two"


def test_systemd_hears_that_it_is_ready_and_lives_and_its_program_does_not(supervised, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        tell = NOTE + "print('socket', os.environ.get('NOTIFY_SOCKET'), flush=True)\n"
        run = supervised(
            tell + ALIVE + "run_supervised(lambda: time.sleep(600))",
            NOTIFY_SOCKET=str(tmp_path / "notify"),
            WATCHDOG_USEC="1000000",
        )
        heard = [systemd.recv(999).decode() for _ in range(6)]
        assert heard[0].startswith("READY=1\n") and "WATCHDOG=1" in heard
        while "STATUS=it runs" not in heard:
            heard.append(systemd.recv(999).decode())
        assert "socket None" in run.text()
        run.process.terminate()
        while heard[-1] != "STOPPING=1":
            heard.append(systemd.recv(999).decode())


def test_without_systemd_nothing_is_sent():
    environment = {"PATH": "x", "WATCHDOG_USEC": "1"}
    Notifier(environment).send("READY=1")
    assert environment == {"PATH": "x"}


def test_another_program_is_refused():
    with pytest.raises(UserError, match=r"'flower-supernod', expected one of .* Did you mean"):
        supervise_module("m", ("flower-supernode", "flower-superexec"), ["flower-supernod"])


def test_patience_is_longer_than_the_pause_between_two_beats():
    from flexlora.deploy.supervised import BEAT_SECONDS

    assert Patience().silence_seconds >= 10 * BEAT_SECONDS
