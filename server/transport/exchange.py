"""Send messages and yield their replies one by one, until all have come or the time is up.

One poll asks for the replies to all messages; they are read one by one (``pulling.py``) and
dropped, so that a round holds one reply in memory and not all of them (measured with 40 replies of
32 MB: 675 MB instead of 1,763 MB).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from types import MappingProxyType

from flwr.app import Message
from flwr.serverapp import Grid

from flexlora.config.resolve import Config
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.link import link_of
from flexlora.server.transport.pulling import discard, pull
from flexlora.server.transport.retry_queue import PendingMessage, RetryPolicy, RetryQueue

__all__ = ["ask", "exchange", "retry_policy", "send"]

ONCE = RetryPolicy()


def retry_policy(grid: Grid, config: Config, timeout: float) -> RetryPolicy:
    """The retry policy of the configuration for a round of ``timeout`` seconds.

    On a simulated clock nothing is sent twice: what a client does in a round is a function of the
    seed, so that a second message would be lost as the first was.
    """
    if clock_of(grid).simulated:
        return ONCE
    return RetryPolicy(
        resends=config.server.resends,
        silence_seconds=config.server.silence_seconds or timeout / 2,
        patience_seconds=config.server.wait_seconds,
        ttl_seconds=config.server.message_ttl_seconds,
        late_seconds=config.server.late_rounds * timeout,
    )


def ask(
    grid: Grid,
    messages: Sequence[PendingMessage],
    config: Config,
    timeout: float,
    on_wait: Callable[[Iterable[PendingMessage]], None] = lambda waiting: None,
) -> Iterator[tuple[PendingMessage, Message | None]]:
    """``exchange`` without waiting for nodes that have gone: for queries and evaluation."""
    policy = replace(retry_policy(grid, config, timeout), patience_seconds=0.0)
    return exchange(grid, messages, timeout=timeout, policy=policy, on_wait=on_wait)


def send(grid: Grid, messages: Iterable[PendingMessage], seconds: float = 0.0) -> None:
    """Send each message once; wait for nothing but a SuperLink that is away, so long at most."""
    sent, clock = list(messages), clock_of(grid)
    now = clock.now()
    copies = [pending.next_copy(pending.node_id, None) for pending in sent]
    ids, _ = link_of(grid).push(copies, now + seconds)
    for pending, message_id in zip(sent, ids, strict=True):
        pending.mark_sent(message_id, now)
        pending.drop_content()


def exchange(
    grid: Grid,
    messages: Iterable[PendingMessage],
    *,
    timeout: float,
    policy: RetryPolicy = ONCE,
    late: Sequence[PendingMessage] = (),
    enough: Callable[[], bool] = lambda: False,
    on_resent: Callable[[PendingMessage, str], None] = lambda pending, loss: None,
    find_node: Callable[[PendingMessage], int | None] = lambda pending: None,
    order: Mapping[PendingMessage, int] = MappingProxyType({}),
    on_wait: Callable[[Iterable[PendingMessage]], None] = lambda waiting: None,
) -> Iterator[tuple[PendingMessage, Message | None]]:
    """``(message, reply)`` as replies come, each message once; ``None`` where no reply came.

    Args:
        policy: when a lost copy is sent again; never by default.
        late: messages of earlier rounds: their replies are yielded too, but not waited for.
        enough: checked before every wait: whether the other replies are no longer needed.
        on_resent: called with every message that is sent again, and why.
        find_node: the id under which a node is back whose own id is gone.
        order: of replies that are there at the same time the lowest is read first; by default they
            are read in the order of the messages.
        on_wait: called before every wait with the messages that are not answered.
    """
    clock = clock_of(grid)
    deadline = clock.now() + timeout
    queue = RetryQueue(
        grid,
        list(messages),
        policy=policy,
        deadline=deadline,
        on_resent=on_resent,
        find_node=find_node,
    )
    for pending in queue.send_all():
        yield pending, pending.error
    while queue.waiting and not enough():
        arrived = False
        ordered = sorted(queue.waiting, key=lambda pending: order.get(pending, 0))
        waiting = [(p, copy) for p in (*late, *ordered) for copy in p.open]
        with closing(pull(grid, waiting)) as replies:
            for pending, message_id, reply in replies:
                arrived = True
                clock.hurry()
                if queue.accept(pending, message_id, reply):
                    discard(grid, pending)
                    yield pending, reply
                if enough():
                    break
        if queue.waiting and not arrived:
            if clock.now() >= deadline:
                break
            for pending in queue.resend_due():
                yield pending, pending.error
            on_wait(queue.waiting)
            clock.wait(min(deadline, queue.next_due))
    needless = enough()
    for pending in queue.waiting:
        if needless:
            discard(grid, pending)
        yield pending, None if needless else pending.error
