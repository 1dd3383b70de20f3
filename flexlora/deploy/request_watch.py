"""Judge a Flower process by the requests it sends, have it retry a server's error, poll less often.

Nothing that can be asked from outside says whether a SuperNode works: its health endpoint answers
after its main loop has ended, and the server's view of a node is open to the server's owner alone.
Its own requests say it:

    SendNodeHeartbeat    about every 20 s, from a thread of its own
    PullMessages         every 3 s; after any other request of the main loop another one follows
                         soon, but after ConfirmMessageReceived, when the node trains

Flower retries 502, 503, 504 and broken connections. A 500 ends the main loop or the heartbeat, and
is what a SuperLink answers whose SQLite says "database is locked". ``watch_requests`` has Flower
read a 500 as 503. One that goes on for minutes is no lock, and the process then starts anew.

A SuperNode polls every 3 s however long it has been idle; a thousand idle nodes are 333 requests a
second, more than a SuperLink's one process can answer (5.5 ms each). ``idle_pause`` makes the pause
between two polls a tenth of the idle time, up to 30 s, so that a node finds its next message at
most 10 % late. It is at least ten times as long as the last poll took, so that a SuperLink with
more nodes than it can answer at once is asked less often by all of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

__all__ = ["RequestWatch", "idle_pause", "watch_requests"]

LOG = logging.getLogger(__name__)
HEARTBEAT, ACTIVATE, CONFIRM = "SendNodeHeartbeat", "ActivateNode", "ConfirmMessageReceived"
POLL = "PullMessages"
POLL_SECONDS = 3.0  # of Flower's SuperNode
IDLE_SHARE, LONGEST_POLL_SECONDS = 0.1, 30.0
POLLS_APART = 10.0  # times as long as the last one took
HEARTBEAT_SECONDS = 120.0
STALL_SECONDS = 300.0  # a request lives 30 s at most without a byte, a pause between two tries 20 s
ERROR_SECONDS = 120.0


def idle_pause(idle_seconds: float, took_seconds: float = 0.0) -> float:
    """Seconds between two polls of a node that has had no message for ``idle_seconds``.

    The last poll was answered after ``took_seconds``.
    """
    pause = max(POLL_SECONDS, IDLE_SHARE * idle_seconds, POLLS_APART * took_seconds)
    return min(pause, LONGEST_POLL_SECONDS)


class RequestWatch:
    """The requests of a process that is a SuperNode or not; ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._active = False
        self._heartbeat = 0.0
        self._last: tuple[str, float] = ("", 0.0)  # of the main loop
        self._worked = 0.0  # when the main loop last sent anything but a poll
        self._took = 0.0  # seconds from the last poll to its answer
        self._failing: dict[str, float] = {}  # method: since when it is answered by errors alone

    def pause(self, method: str) -> float:
        """Seconds to wait before ``method`` is sent, beyond the 3 s that Flower waits."""
        with self._lock:
            if method != POLL or self._last[0] != POLL:
                return 0.0
            return idle_pause(self._clock() - self._worked, self._took) - POLL_SECONDS

    def sent(self, method: str) -> None:
        with self._lock:
            if method == HEARTBEAT:
                self._heartbeat = self._clock()
            else:
                self._last = method, self._clock()
                if method != POLL:
                    self._worked = self._clock()

    def answered(self, method: str, *, error: bool) -> None:
        """``error``: by a status 500."""
        with self._lock:
            if method == POLL and self._last[0] == POLL:
                self._took = self._clock() - self._last[1]
            if error:
                self._failing.setdefault(method, self._clock())
            else:
                self._failing.pop(method, None)
            if method == ACTIVATE and not error and not self._active:
                self._active, self._heartbeat = True, self._clock()

    def trouble(self) -> str:
        """Why the process should start anew; empty where it works."""
        now = self._clock()
        with self._lock:
            for method, since in self._failing.items():
                if now > since + ERROR_SECONDS:
                    return f"the server has answered {method} by errors for {now - since:.0f} s"
            if not self._active:
                return ""
            method, when = self._last
            if now > self._heartbeat + HEARTBEAT_SECONDS:
                return f"it has sent no heartbeat for {now - self._heartbeat:.0f} s"
            if method != CONFIRM and now > when + STALL_SECONDS:
                return f"it has sent nothing for {now - when:.0f} s after {method}"
        return ""


def watch_requests(client: Any, watch: RequestWatch) -> None:
    """Report what every instance of Flower's HTTP ``client`` sends; turn 500 into 503; poll less.

    The class has ``_send(context, **options)``, which returns a response with ``status_code``;
    ``context.rpc_method`` is a path that ends in the method's name.
    """
    send = client._send

    @wraps(send)
    def watched(self: Any, context: Any, **options: Any) -> Any:
        method = context.rpc_method.rpartition("/")[2]
        time.sleep(watch.pause(method))
        watch.sent(method)
        response = send(self, context, **options)
        failed = response.status_code == 500
        watch.answered(method, error=failed)
        if failed:
            LOG.warning("the server answered %s by an error (500); it is asked again", method)
            response.status_code = 503
        return response

    client._send = watched
