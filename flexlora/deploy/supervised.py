"""The supervised side: run a program of Flower's so that it ends when it has stopped working.

A Flower process can stop working and stay: a SuperNode whose main loop has ended is kept alive by
its HTTP thread, one whose heartbeat thread has died polls on while the server counts it as gone.
Here the process ends in both cases, and ``supervisor.py`` starts it again.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from flexlora.deploy.supervisor import LIFELINE

__all__ = ["NOT_WORKING", "run_supervised"]

NOT_WORKING = 75  # EX_TEMPFAIL of sysexits.h: start it again
BEAT_SECONDS = 2.0
GRACE_SECONDS = 15.0  # to end in, when the supervisor has gone
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_supervised(
    main: Callable[[], Any],
    *,
    trouble: Callable[[], str] = lambda: "",
    every_thread: bool = False,
) -> None:
    """Call ``main`` in this thread, which must be the process's first; never returns.

    The process ends when ``main`` does, whatever other threads there are, when ``trouble`` says why
    it should, and when the supervisor is gone.

    Args:
        every_thread: end also when any thread dies of an exception.
    """
    if every_thread:
        threading.excepthook = _end_of_thread
    line = os.environ.pop(LIFELINE, "")
    if line:
        _end_with_parent()
        os.set_inheritable(int(line), False)
    beat = threading.Thread(target=_beat, args=(int(line or -1), trouble), daemon=True)
    beat.start()
    status: object = NOT_WORKING
    try:
        main()
        _say("its main loop has ended")
    except SystemExit as ended:
        status = ended.code
    except KeyboardInterrupt:
        status = 0
    except BaseException:
        logging.getLogger(__name__).exception("it fails")
    _exit(status if isinstance(status, int) else int(status is not None))


def _beat(line: int, trouble: Callable[[], str]) -> None:
    while not (why := trouble()):
        if line >= 0:
            try:
                os.write(line, b".")
            except OSError:  # nobody reads it
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(GRACE_SECONDS)
                _exit(NOT_WORKING)
        time.sleep(BEAT_SECONDS)
    _say(why)
    _exit(NOT_WORKING)


def _end_of_thread(hook: threading.ExceptHookArgs) -> None:
    threading.__excepthook__(hook)
    if not issubclass(hook.exc_type, SystemExit):
        _say(f"its thread '{hook.thread.name if hook.thread else ''}' has died")
        _exit(NOT_WORKING)


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when the supervisor ends; Linux alone has this."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _say(why: str) -> None:
    print(f"flexlora: {why}; the process ends, to be started again.", file=sys.stderr, flush=True)


def _exit(status: int) -> None:
    """End now: threads that are not daemons would keep the process."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
