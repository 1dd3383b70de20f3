"""Start a node's three processes by hand: the scripts in ``bin/``, each with a log of its own.

They go on after the terminal is closed, and end with the machine; systemd's units are what starts
them again (the folder's README).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from flexlora.errors import RunFailed

__all__ = ["start_node"]

# In this order, and the words that a process prints when the next one may start.
READY = {
    "start-trainer": "ready on",
    "start-supernode": "SuperNode ID",
    "start-clientapps": "Starting Flower SuperExec",
}
SLOWLY = 900.0  # seconds that a large base takes to load
TAIL = 3  # lines of a log


def start_node(folder: Path, seconds: float = SLOWLY) -> None:
    """Start the scripts one after the other; what was started ends where a later one fails.

    Raises:
        RunFailed: a process ended or was not ready in time, with the end of its log.
    """
    logs = folder / "state" / "log"
    logs.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen] = []
    try:
        for script in READY:
            log = logs / f"{script.removeprefix('start-')}.log"
            with log.open("w", encoding="utf-8") as out:
                process = subprocess.Popen(
                    [folder / "bin" / script],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
                    start_new_session=True,
                )
            started.append(process)
            _wait_until_ready(script, process, log, seconds)
            print(f"{script}: process {process.pid}, {log}", flush=True)
    except BaseException:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        raise
    # The scripts are leaders of sessions of their own: a minus sends the signal to all in each.
    text = "".join(f"-{process.pid}\n" for process in started)
    (folder / "state" / "pids").write_text(text, encoding="ascii")


def _wait_until_ready(script: str, process: subprocess.Popen, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while READY[script] not in (text := log.read_text(encoding="utf-8", errors="replace")):
        ended = process.poll()
        if ended is not None or time.monotonic() > deadline:
            how = f"ended with status {ended}" if ended is not None else "is not ready in time"
            last = " / ".join([line for line in text.splitlines() if line.strip()][-TAIL:])
            raise RunFailed(f"{script} {how}: {last} ({log})")
        time.sleep(0.2)
