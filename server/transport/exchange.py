"""Letters out, replies in one at a time, until all have come or the time is up.

Replies are pulled one by one and dropped once read, so that the memory of a round is that of one
reply, not of all (FIELD.md: 675 MB instead of 1,763 MB for 40 replies of 32 MB).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from flwr.app import Message
from flwr.serverapp import Grid

from flexlora.config.resolve import Config
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.resending import Letter, Post, Resending

__all__ = ["ask", "exchange", "resending_of", "send"]

ONCE = Resending()


def resending_of(grid: Grid, config: Config, timeout: float) -> Resending:
    """What the configuration says of a round that lasts ``timeout``.

    On a simulated clock nothing is sent twice: what a client does in a round is a function of the
    seed, so that a second message would fare as the first did.
    """
    if clock_of(grid).simulated:
        return ONCE
    server = config.server
    return Resending(
        resends=server.resends,
        silence_seconds=server.silence_seconds or timeout / 2,
        patience_seconds=server.wait_seconds,
        ttl_seconds=server.message_ttl_seconds,
        late_seconds=server.late_rounds * timeout,
    )


def ask(
    grid: Grid, letters: Sequence[Letter], config: Config, timeout: float
) -> Iterator[tuple[Letter, Message | None]]:
    """``exchange`` of questions: a node that has gone is not waited for."""
    resending = replace(resending_of(grid, config, timeout), patience_seconds=0.0)
    return exchange(grid, letters, timeout=timeout, resending=resending)


def send(grid: Grid, letters: Iterable[Letter]) -> None:
    """Letters out, once, without waiting for anything."""
    post = Post(
        grid,
        list(letters),
        resending=ONCE,
        deadline=math.inf,
        told=lambda letter, cause: None,
        forward=lambda letter: None,
    )
    for letter in [*post.begin(), *post.waiting]:
        letter.forget()


def exchange(
    grid: Grid,
    letters: Iterable[Letter],
    *,
    timeout: float,
    resending: Resending = ONCE,
    overdue: Sequence[Letter] = (),
    enough: Callable[[], bool] = lambda: False,
    told: Callable[[Letter, str], None] = lambda letter, cause: None,
    forward: Callable[[Letter], int | None] = lambda letter: None,
    turns: Mapping[Letter, int] = MappingProxyType({}),
) -> Iterator[tuple[Letter, Message | None]]:
    """``(letter, reply)`` as replies come, each letter once; ``None`` for one that got no answer.

    Args:
        resending: what is done about copies that are lost; nothing by default.
        overdue: letters of earlier rounds: answers to them are handed on too, but nobody waits.
        enough: asked before every wait: whether the others need not answer any more.
        told: called with every letter that is sent again, and why.
        forward: where a letter's node is to be found when its id is gone.
        turns: of answers that are there at the same time the lowest is read first; by default they
            are read in the order of the letters.
    """
    clock = clock_of(grid)
    deadline = clock.now() + timeout
    post = Post(
        grid, list(letters), resending=resending, deadline=deadline, told=told, forward=forward
    )
    for letter in post.begin():
        yield letter, letter.error
    while post.waiting and not enough():
        arrived = False
        for letter, message_id in _open_copies([*overdue, *_in_turn(post.waiting, turns)]):
            if enough():
                break
            if message_id not in letter.open:  # another copy was answered in this very pass
                continue
            for reply in list(grid.pull_messages([message_id]))[:1]:  # a second one is dropped
                arrived = True
                if post.take(letter, message_id, reply):
                    yield letter, reply
        if post.waiting and not arrived:
            if clock.now() >= deadline:
                break
            for letter in post.resend():
                yield letter, letter.error
            clock.wait(min(deadline, post.next_due))
    needless = enough()
    for letter in post.waiting:
        yield letter, None if needless else letter.error


def _in_turn(letters: Iterable[Letter], turns: Mapping[Letter, int]) -> list[Letter]:
    return sorted(letters, key=lambda letter: turns.get(letter, 0))


def _open_copies(letters: Iterable[Letter]) -> list[tuple[Letter, str]]:
    return [(letter, message_id) for letter in letters for message_id in letter.open]
