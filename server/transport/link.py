"""Calls to the SuperLink that survive it: a 500, a reset or a restart is retried, never raised.

Flower's own client repeats HTTP 502 to 504 and broken connections without end and raises at a 500.
Here every such failure counts as an outage. It is logged once, when it begins and when it is over,
and lasts at most until the caller's deadline. Answers that blame the caller (4xx) are raised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from flexlora.errors import one_line
from flexlora.server.transport.clocks import Clock, clock_of
from flexlora.server.transport.flower_private import (
    ObjectPushError,
    is_outage,
    pulls_by_itself,
    tried_once,
)

__all__ = ["Link", "Unreachable", "link_of"]

LOG = logging.getLogger(__name__)
T = TypeVar("T")

# Messages in one HTTP request, whose objects follow one by one. A node that sees its message before
# the objects are there asks for them again and again: 17 needless requests a node with 100.
PUSHED_TOGETHER = 10
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10.0


class Unreachable(Exception):
    """The SuperLink could not answer; the message is the last error."""


class Link:
    """The way to one grid, and whether its SuperLink answers at present."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.asked_together, self.first_asked = 1000, 0  # of a poll (``pulling.py``)
        self._down_since: float | None = None

    @property
    def clock(self) -> Clock:
        return clock_of(self.grid)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """One try of a call.

        Raises:
            Unreachable: the SuperLink could not answer.
        """
        try:
            with tried_once(self.grid):
                yield
        except Exception as error:
            if not is_outage(error):
                raise
            if self._down_since is None:
                self._down_since = time.monotonic()
                LOG.warning("the SuperLink does not answer, and is asked again: %s", error)
            raise Unreachable(one_line(error)) from error
        if self._down_since is not None:
            seconds, self._down_since = time.monotonic() - self._down_since, None
            LOG.warning("the SuperLink answers again after %.1f s", seconds)

    def until(self, deadline: float, call: Callable[[], T]) -> T:
        """The result of a call, tried until ``deadline`` on the grid's clock.

        Raises:
            Unreachable: the SuperLink could not answer in time.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                with self.attempt():
                    return call()
            except Unreachable:
                left = deadline - self.clock.now()
                if left <= 0:
                    raise
                time.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def node_ids(self, deadline: float) -> set[int]:
        """The nodes that are connected.

        Raises:
            Unreachable: the SuperLink does not answer in time.
        """
        return self.until(deadline, lambda: set(self.grid.get_node_ids()))

    def push(self, messages: Sequence[Message], deadline: float) -> tuple[list[str | None], str]:
        """The id of each message, None where it was not taken, and why the last such was not.

        A request that is repeated has the same ids, under which the SuperLink has each message
        once. One that is too large for it is halved; a single message that is too large has no id,
        and there are fewer ids than messages.
        """
        ids: list[str | None] = []
        loss = "no such node"  # Flower gives no id to a message for a node that it has forgotten
        size = PUSHED_TOGETHER if pulls_by_itself(self.grid) else max(1, len(messages))
        batches = [messages[at : at + size] for at in range(0, len(messages), size)]
        while batches:
            batch = batches.pop(0)
            taken: Sequence[str | None] = [None] * len(batch)
            try:
                taken = self.until(deadline, partial(self._push, batch))
            except ObjectPushError:
                # A slow SuperLink may refuse records that it took when they came the first time.
                loss = "its upload broke off"
            except Unreachable as error:
                loss = f"the SuperLink did not take it: {error}"
                return [*ids, *[None] * (len(messages) - len(ids))], loss
            if not taken and len(batch) > 1:
                half = len(batch) // 2
                batches[:0] = [batch[:half], batch[half:]]
            ids += taken
        return ids, loss

    def _push(self, batch: Sequence[Message]) -> list[str | None]:
        return list(self.grid.push_messages(batch))


def link_of(grid: Grid) -> Link:
    """The grid's one link: an outage is logged once for all calls."""
    link = getattr(grid, "link", None)
    if link is None:
        link = grid.link = Link(grid)  # type: ignore[attr-defined]
    return link
