"""Many SuperNodes in one process, without ClientApps: each a thread that speaks Flower's fleet API.

    python -m flexlora.simulations.benchmarks.server_memory_nodes ADDRESS CASE_AS_JSON

What they say is flwr's own: registration, heartbeats, objects in chunks, confirmation. Train
messages are fetched and answered one after the other, in the case's order, so that this process
holds one reply. It ends when its standard input does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from flwr.app import Message, MessageType
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supernode.fleet_http_connection import http_request_response

from flexlora.simulations.benchmarks.server_memory_answers import Answers, ServerCase

__all__ = ["main"]

POLL = 1.0  # seconds between two questions of a node


class Line:
    """One train message at a time: places in order, and again in the next round."""

    def __init__(self, case: ServerCase) -> None:
        places = list(range(case.replies))
        self._order = places[::-1] if case.reversed else places
        self._served, self._moved = 0, threading.Condition()

    @contextmanager
    def turn(self, place: int) -> Iterator[None]:
        """The block has the line to itself, after those before it."""
        with self._moved:
            self._moved.wait_for(lambda: self._order[self._served % len(self._order)] == place)
            try:
                yield
            finally:
                self._served += 1
                self._moved.notify_all()


class Node:
    """One node's side of a connection; ``answers`` is what stands in for its ClientApp."""

    def __init__(self, connection: tuple, place: int, answers: Answers) -> None:
        _, self.receive, self._send, _, _, self._pull, self._push, self._confirm = connection
        self.place, self.answers = place, answers

    def answer(self, header: Message, tree: ObjectTree) -> None:
        """Fetch what a header announces, and send back what is answered to it."""
        run_id = header.metadata.run_id
        message = self._fetched(header, tree, run_id)
        reply = Message(self.answers.to(message, self.place), reply_to=message)
        del message
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, own = get_all_nested_objects(reply), get_object_tree(reply)
            wanted, session = self._send(reply, own, 0.1)
            push: Callable[[str, bytes], None] = partial(self._push, run_id, session)
            push_objects(objects, push, object_ids_to_push=wanted)

    def _fetched(self, header: Message, tree: ObjectTree, run_id: int) -> Message:
        names = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
        contents = pull_objects(names, partial(self._pull, run_id))
        self._confirm(run_id, header.metadata.message_id)
        message = inflate_object_from_contents(tree.object_id, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = header.metadata.message_id
        return message


def serve(address: str, place: int, answers: Answers, line: Line, ended: threading.Event) -> None:
    """A node's life: register, ask for messages, answer, until the process ends."""
    with http_request_response(address, insecure=True) as connection:
        node = Node(connection, place, answers)
        while not ended.wait(POLL):
            received = node.receive()
            if received is None:
                continue
            if received[0].metadata.message_type == MessageType.TRAIN:
                with line.turn(place):
                    node.answer(*received)
            else:
                node.answer(*received)


def main(arguments: list[str]) -> None:
    """All nodes of a case until standard input ends."""
    address, case = arguments[0], ServerCase.from_json(arguments[1])
    answers, line, ended = Answers(case), Line(case), threading.Event()
    threads = [
        threading.Thread(target=serve, args=(address, place, answers, line, ended), daemon=True)
        for place in range(case.replies)
    ]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join(timeout=5.0)


if __name__ == "__main__":
    main(sys.argv[1:])
