"""Keep one program running: start it, watch its signs of life, start it again, end it with us.

The program is one of ours around one of Flower's (``supervised.py``). It writes a byte to a pipe
every few seconds while it works. A program that ends, or whose byte does not come, is started again
after 1, 2, 4 ... seconds; the pause is short again once it has run for a while. Under systemd the
supervisor is the service's main process and answers the watchdog itself, so that a supervisor that
hangs is restarted too.

    SIGTERM or Ctrl-C    the program and what it started end, then the supervisor
    SIGKILL              the kernel sends the program SIGTERM (``supervised.py``)
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from flexlora.deploy.systemd_notify import Notifier
from flexlora.errors import UserError, nearest

__all__ = ["LIFELINE", "Patience", "Supervisor", "supervise_module"]

LIFELINE = "FLEXLORA_LIFELINE"  # the pipe's file descriptor, in the program's environment
WRONG_USAGE = 2  # the exit status of a command line that no second start mends
TICK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds: without a sign of life, to start in, to end in, of the longest pause.

    A program that has run for ``settled_seconds`` is started again after the shortest pause.
    """

    silence_seconds: float = 60.0
    start_seconds: float = 300.0
    stop_seconds: float = 30.0
    longest_pause: float = 300.0
    settled_seconds: float = 300.0


class Supervisor:
    """Runs ``command`` until a stop signal arrives.

    Args:
        name: of the program, for the log.
        say: prints one line; default: standard error.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        patience: Patience | None = None,
        environment: MutableMapping[str, str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.name, self.command = name, list(command)
        self.patience = patience or Patience()
        self.environment = os.environ if environment is None else environment
        self.notifier = Notifier(self.environment)
        self.say = say or (lambda line: print(f"flexlora: {line}", file=sys.stderr, flush=True))
        self.failures = 0  # starts in a row after which it did not settle
        self._stopping = False

    def run(self) -> int:
        """Start the program again and again; the exit status after a stop signal.

        Returns 2 where the program says that its command line is wrong.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self.notifier.send("READY=1", f"STATUS=starting {self.name}")
        while not self._stopping:
            began = time.monotonic()
            status = self._run_once()
            if self._stopping:
                break
            if status == WRONG_USAGE:
                self.say(f"{self.name} does not understand its command line; it is not restarted.")
                return WRONG_USAGE
            ran = time.monotonic() - began
            self.failures = 1 if ran >= self.patience.settled_seconds else self.failures + 1
            pause = min(self.patience.longest_pause, 2.0 ** (self.failures - 1))
            text = f"{self.name} ended ({_named(status)}) after {ran:.0f} s"
            self.say(f"{text}; it is started again in {pause:g} s.")
            self.notifier.send(f"STATUS={text}, started again in {pause:g} s")
            self._wait(pause)
        self.notifier.send("STOPPING=1")
        return 0

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping and (left := until - time.monotonic()) > 0:
            self.notifier.send("WATCHDOG=1")
            time.sleep(min(TICK_SECONDS, left))

    def _run_once(self) -> int:
        """One life of the program: its exit status, negative for a signal."""
        reading, writing = os.pipe()
        try:
            program = subprocess.Popen(
                self.command,
                env={**self.environment, LIFELINE: str(writing)},
                pass_fds=(writing,),
                start_new_session=True,  # Ctrl-C comes here alone
            )
        finally:
            os.close(writing)
        try:
            self._watch(program, reading)
            if program.poll() is None:
                self._end(program)
            return program.returncode
        finally:
            os.close(reading)
            if self._stopping:  # a SuperExec's apps would outlive it
                with suppress(ProcessLookupError):
                    os.killpg(program.pid, signal.SIGKILL)

    def _watch(self, program: subprocess.Popen, reading: int) -> None:
        """Return when the program has ended, is to end, or shows no sign of life."""
        heard, patience = time.monotonic(), self.patience.start_seconds
        while program.poll() is None and not self._stopping:
            self.notifier.send("WATCHDOG=1")
            if select.select([reading], [], [], TICK_SECONDS)[0]:
                if os.read(reading, 4096):
                    if patience != self.patience.silence_seconds:
                        self.notifier.send(f"STATUS={self.name} runs")
                    heard, patience = time.monotonic(), self.patience.silence_seconds
                else:  # it has closed the pipe and is about to end
                    time.sleep(TICK_SECONDS)
            if time.monotonic() > heard + patience:
                self.say(f"{self.name} has shown no sign of life for {patience:g} s; it is ended.")
                return

    def _end(self, program: subprocess.Popen) -> None:
        """SIGTERM, and SIGKILL for one that does not end in time."""
        program.terminate()
        deadline = time.monotonic() + self.patience.stop_seconds
        while program.poll() is None and time.monotonic() < deadline:
            self.notifier.send("WATCHDOG=1")
            time.sleep(0.1)
        if program.poll() is None:
            self.say(f"{self.name} does not end on SIGTERM; it is killed.")
            program.kill()
            program.wait()


def _named(status: int) -> str:
    """``status 1``, or ``SIGKILL`` for a negative one."""
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def supervise_module(module: str, programs: Sequence[str], command: Sequence[str]) -> int:
    """Supervise ``python -m module PROGRAM ...``, where ``command`` is one of ``programs``.

    Raises:
        UserError: another program.
    """
    program = command[0]
    if program not in programs:
        raise UserError(
            f"the program is '{program}', expected one of {', '.join(programs)}."
            f"{nearest(program, programs)}"
        )
    return Supervisor(program, [sys.executable, "-m", module, *command]).run()
