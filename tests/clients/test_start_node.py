"""The last step of ``flexlora client enroll``: three scripts, each with a log, or none of them."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from flexlora.clients.setup.start_node import READY, start_node
from flexlora.errors import RunFailed


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "bin").mkdir()
    for script, words in READY.items():
        write(tmp_path, script, f"echo '{words}'; exec sleep 600")
    yield tmp_path
    for file in tmp_path.glob("state/*pid*"):
        for pid in file.read_text().split():
            os.killpg(abs(int(pid)), signal.SIGKILL)


def write(folder, script, text):
    file = folder / "bin" / script
    file.write_text(f"#!/bin/sh\necho $$ >> {folder}/started\n{text}\n")
    file.chmod(0o755)


def started(folder):
    return [int(pid) for pid in (folder / "started").read_text().split()]


def test_all_three_run_in_sessions_of_their_own_and_one_kill_ends_them(folder, capsys):
    start_node(folder, seconds=300.0)
    pids = started(folder)
    assert len(pids) == 3 and all(os.getsid(pid) == pid for pid in pids)
    assert (folder / "state" / "pids").read_text().split() == [f"-{pid}" for pid in pids]
    assert "start-supernode: process" in capsys.readouterr().out
    logs = {file.name for file in (folder / "state" / "log").iterdir()}
    assert logs == {"trainer.log", "supernode.log", "clientapps.log"}


def test_where_one_does_not_start_none_is_left(folder):
    write(folder, "start-supernode", "echo 'no such key' >&2; exit 3")
    with pytest.raises(RunFailed, match="start-supernode ended with status 3: no such key"):
        start_node(folder, seconds=300.0)
    trainer, *_ = started(folder)
    psutil.wait_procs([psutil.Process(trainer)] if psutil.pid_exists(trainer) else [], timeout=20)
    assert len(started(folder)) == 2 and not (folder / "state" / "pids").exists()
    assert not psutil.pid_exists(trainer) or psutil.Process(trainer).status() == "zombie"
