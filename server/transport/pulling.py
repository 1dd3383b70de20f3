"""Pull the replies to many messages: one poll for all, then reply by reply, each within its limit.

A poll hands over every reply that has come, as a list of its objects; the objects stay on the
SuperLink. They are pulled for one reply at a time, in the order of the messages, so that one reply
is in memory. A reply whose node is still uploading it does not hold up the others.

A reply beyond the limit of its message, or that is none, becomes an error in its place: the cause
names what came, and is that node's failed row. Other grids than Flower's over HTTP hand over whole
messages (``pull_messages``), by a list or one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from flexlora.server.transport.flower_private import (
    LOST,
    MOST_OBJECTS,
    UNREADABLE,
    Handed,
    ObjectGone,
    ObjectTooLarge,
    confirm,
    error_reply,
    poll,
    pull_object,
    pulls_by_itself,
)
from flexlora.server.transport.inflating import Unreadable, inflated
from flexlora.server.transport.link import Link, Unreachable, link_of
from flexlora.server.transport.retry_queue import PendingMessage

__all__ = ["Waiting", "discard", "pull"]

LOG = logging.getLogger(__name__)
Waiting = Sequence[tuple[PendingMessage, str]]  # a message and the id of one of its copies
MOST_ASKED = 1000  # messages in one poll
LONGEST_PAUSE_SECONDS = 5.0  # between two looks at an upload that goes on


def pull(
    grid: Grid, waiting: Waiting
) -> Generator[tuple[PendingMessage, str, Message], None, None]:
    """The replies that are there, in the order of ``waiting``, read as the caller takes them.

    None where the SuperLink does not answer. Replies that the caller does not take come again at
    the next call; those from a grid that makes them as they are taken are not made.
    """
    link, by_id = link_of(grid), {message_id: pending for pending, message_id in waiting}
    asked = [name for name, pending in by_id.items() if name not in pending.handed]
    try:
        for handed in _in_order((_poll if pulls_by_itself(grid) else _given)(link, asked), by_id):
            message_id, pending = handed.answers, by_id[handed.answers]
            if message_id in pending.open:  # no other copy was answered before
                reply = _read(link, pending, handed)
                if reply is not None:
                    pending.handed.pop(message_id, None)
                    yield pending, message_id, reply
    except Unreachable:
        return


def _in_order(come: Iterable[Handed], by_id: Mapping[str, PendingMessage]) -> Iterator[Handed]:
    """In the order of the messages, those of earlier calls too; lazy ones as they are made."""
    asked_for = (handed for handed in come if handed.answers in by_id)
    if not isinstance(come, Sequence):
        yield from asked_for
        return
    for handed in asked_for:
        by_id[handed.answers].handed.setdefault(handed.answers, handed)
    for message_id, pending in by_id.items():
        if message_id in pending.handed:
            yield pending.handed[message_id]


def discard(grid: Grid, pending: PendingMessage) -> None:
    """Let the SuperLink drop what was handed over of a message that needs no reply any more."""
    for handed in pending.handed.values():
        if handed.reply_id:
            confirm(grid, handed.reply_id)
    pending.handed.clear()


def _given(link: Link, message_ids: Sequence[str]) -> Iterable[Handed]:
    """From a grid with a ``pull_messages`` of its own; lazily where that is."""
    with link.attempt():
        replies = link.grid.pull_messages(message_ids) if message_ids else ()
    handed = (
        Handed(answers=reply.metadata.reply_to_message_id, reply_id="", whole=reply)
        for reply in replies
    )
    return list(handed) if isinstance(replies, Sequence) else handed


def _poll(link: Link, message_ids: Sequence[str]) -> list[Handed]:
    """What has come since; asks for half as many at a time after a failure.

    The SuperLink forgets what a failed poll would have handed over: the fewer messages a poll has,
    the fewer are lost with one that always fails. The others come first the next time.
    """
    found: list[Handed] = []
    first = link.first_asked % max(1, len(message_ids))
    ids = [*message_ids[first:], *message_ids[:first]]
    for at in range(0, len(ids), link.asked_together):
        group = ids[at : at + link.asked_together]
        try:
            with link.attempt():
                found += poll(link.grid, group)
        except Unreachable:
            link.first_asked, link.asked_together = first + at + len(group), max(1, len(group) // 2)
            return found
    link.first_asked, link.asked_together = 0, min(MOST_ASKED, 2 * link.asked_together)
    return found


def _read(link: Link, pending: PendingMessage, handed: Handed) -> Message | None:
    """A reply that was handed over, or the error in its place; None while it is uploaded."""
    if handed.whole is None and link.clock.now() < handed.next_look:
        return None
    reply: Message | None
    try:
        reply = handed.whole or _message(link, handed, pending.most_bytes)
    except Unreadable as error:
        LOG.warning("node %d: %s", pending.node_id, error)
        reply = error_reply(pending.metadata, UNREADABLE, str(error))
    except ObjectGone as error:
        reply = error_reply(pending.metadata, LOST, str(error))
    if reply is None:
        handed.next_look = link.clock.now() + handed.pause
        handed.pause = min(2 * handed.pause, LONGEST_PAUSE_SECONDS)
        return None
    if handed.reply_id:
        confirm(link.grid, handed.reply_id)
    return reply


def _message(link: Link, handed: Handed, most_bytes: int) -> Message | None:
    """Pull and inflate a reply; None where an object of it is not uploaded yet.

    Raises:
        Unreadable: it is no message, or has more than ``most_bytes`` or ``MOST_OBJECTS``.
        ObjectGone: the SuperLink lacks an object.
        Unreachable: the SuperLink does not answer.
    """
    if len(handed.objects) > MOST_OBJECTS:
        raise Unreadable(f"reply of more than {MOST_OBJECTS:,} objects")
    contents: dict[str, bytes] = {}
    held = 0
    for object_id in handed.objects:
        try:
            with link.attempt():
                content = pull_object(link.grid, object_id, most_bytes - held)
        except ObjectTooLarge as error:
            raise _too_large(held + error.size, most_bytes) from None
        if content is None:
            others = (name for name in handed.objects if name != object_id)
            handed.objects = (object_id, *others)  # the next look begins with it
            return None
        contents[object_id] = content
        held += len(content)
        if held > most_bytes:
            raise _too_large(held, most_bytes)
    return inflated(handed.reply_id, contents, most_bytes)


def _too_large(size: int, most_bytes: int) -> Unreadable:
    return Unreadable(f"reply of {size:,} bytes or more, expected at most {most_bytes:,}")
