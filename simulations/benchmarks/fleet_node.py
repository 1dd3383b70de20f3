"""A node without a ClientApp: it speaks Flower's fleet API as a SuperNode does.

A SuperNode's loop, request by request: register (without node authentication) and activate with a
key, a heartbeat every 18 to 23 seconds, one ``PullMessages`` every 3 seconds or, after 30 seconds
without a message, less often, as ``flexlora client supervise`` has it; for a message
``GetRun`` and ``GetFab`` (once a run), ``PullObject`` for each object, ``ConfirmMessageReceived``,
``PushMessages``, ``PushObject`` for each object that the SuperLink lacks, and at once the next
``PullMessages``. What is left out is Flower's ClientApp process and what it takes.

Each step is a method, so that a node that lies or breaks off is a subclass::

    class Liar(StubNode):
        def answer(self, message):          # the content of its reply
            ...
        def objects(self, reply):           # the objects that it uploads, as bytes by their id
            tree, contents = super().objects(reply)
            ...

    with RunningFleet([Liar(address), StubNode(address)]) as fleet:
        ...                                 # fleet.nodes have ids, and count what they asked

The methods run in the fleet's one thread (``fleet_running.py``) and must not wait;
``think_seconds`` is for that.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections import Counter
from contextlib import suppress

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from flexlora.deploy.request_watch import idle_pause
from flexlora.simulations.benchmarks.fleet_connection import FleetConnection, FleetRefused

__all__ = ["StubNode"]

HEARTBEAT_SECONDS = 17.5, 22.5
RESTART_SECONDS = 10.0
LEAVE_SECONDS = 3.0
MISSING_SECONDS = 1.0, 10.0  # first and longest pause for an object that is not there yet


class StubNode:
    """One node.

    Args:
        address: ``HOST:PORT`` of the SuperLink.
        name: whatever the caller knows it by.
        key: registered at the SuperLink with ``flwr supernode register``; None makes one and
            registers it, which a SuperLink with node authentication refuses.
        tls: trusts the SuperLink's authority; None speaks plain HTTP.
        poll_seconds: between two questions for messages; None for a supervised SuperNode's pace.
        think_seconds: between a message and the reply to it.
    """

    def __init__(
        self,
        address: str,
        *,
        name: str = "",
        key: ec.EllipticCurvePrivateKey | None = None,
        tls: ssl.SSLContext | None = None,
        poll_seconds: float | None = None,
        think_seconds: float = 0.0,
    ) -> None:
        self.name, self.poll_seconds, self.think_seconds = name, poll_seconds, think_seconds
        self._registers = key is None
        self.connection = FleetConnection(
            address, key or ec.generate_private_key(ec.SECP256R1()), tls
        )
        self.node: Node | None = None
        self.answered: Counter[str] = Counter()  # messages by type
        self.refusals: list[FleetRefused] = []  # each would have ended a SuperNode
        self._runs: set[int] = set()

    def answer(self, message: Message) -> RecordDict | Error | None:
        """The content of the reply, an error in its place, or None: no reply at all."""
        return RecordDict()

    def objects(self, reply: Message) -> tuple[ObjectTree, dict[str, bytes]]:
        """The tree that announces a reply, and each object of it as bytes by its id."""
        nested = get_all_nested_objects(reply)
        return get_object_tree(reply), {name: part.deflate() for name, part in nested.items()}

    async def run(self, ended: asyncio.Event, start_after: float = 0.0) -> None:
        """The node's life until ``ended``.

        Raises:
            FleetRefused: the SuperLink does not let it in.
        """
        await _until(ended, start_after)
        await self.enter()
        worked = time.monotonic()
        beating = asyncio.create_task(self.beat())
        try:
            while not ended.is_set():
                asked = time.monotonic()
                try:
                    busy = await self.turn()
                except FleetRefused as refusal:
                    self.refusals.append(refusal)
                    busy = False
                if busy:
                    worked = time.monotonic()
                else:
                    now = time.monotonic()
                    pause = self.poll_seconds or idle_pause(now - worked, now - asked)
                    await _until(ended, pause)
        finally:
            beating.cancel()
            assert self.node is not None
            with suppress(FleetRefused, TimeoutError):
                leave = DeactivateNodeRequest(node_id=self.node.node_id)
                await asyncio.wait_for(self.connection.ask(leave), LEAVE_SECONDS)
            self.connection.close()

    async def enter(self) -> None:
        """Register and activate, again where the answer to an earlier try was lost."""
        public_key = self.connection.public_key
        activate = ActivateNodeRequest(
            public_key=public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        if self._registers:
            try:
                await self.connection.ask(RegisterNodeFleetRequest(public_key=public_key))
            except FleetRefused as refusal:
                if not (self.connection.retries and "already in use" in str(refusal)):
                    raise
        while self.node is None:
            try:
                self.node = Node(node_id=(await self.connection.ask(activate)).node_id)
            except FleetRefused:  # a SuperNode ends, and its service starts another
                if not self.connection.retries:
                    raise
                await asyncio.sleep(RESTART_SECONDS)

    async def beat(self) -> None:
        """Heartbeats until cancelled."""
        beat = SendNodeHeartbeatRequest(
            node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        while True:
            try:
                await self.connection.ask(beat)
            except FleetRefused as refusal:
                self.refusals.append(refusal)
            await asyncio.sleep(random.uniform(*HEARTBEAT_SECONDS))

    async def turn(self) -> bool:
        """Ask for a message and answer it; whether there was one."""
        response = await self.connection.ask(PullMessagesRequest(node=self.node))
        if not response.messages_list:
            return False
        header = message_from_proto(response.messages_list[0])
        message = await self.fetch(header, response.message_object_trees[0])
        if message is None:
            return False
        if self.think_seconds:
            await asyncio.sleep(self.think_seconds)
        content = self.answer(message)
        if content is not None:
            await self.push(Message(content, reply_to=message))
            self.answered[message.metadata.message_type] += 1
        return True

    async def fetch(self, header: Message, tree: ObjectTree) -> Message | None:
        """The message behind a header, confirmed; None where an object of it is gone."""
        run_id = header.metadata.run_id
        if run_id not in self._runs:
            run = (await self.connection.ask(GetRunRequest(node=self.node, run_id=run_id))).run
            fab = GetFabRequest(node=self.node, hash_str=run.fab_hash, run_id=run_id)
            await self.connection.ask(fab)
            self._runs.add(run_id)
        names = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
        pulled = await asyncio.gather(*(self.pull(run_id, name) for name in names))
        contents = {
            name: part for name, part in zip(names, pulled, strict=True) if part is not None
        }
        if len(contents) < len(names):
            return None
        message_id = header.metadata.message_id
        await self.connection.ask(
            ConfirmMessageReceivedRequest(
                node=self.node, run_id=run_id, message_object_id=message_id
            )
        )
        message = inflate_object_from_contents(tree.object_id, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = message_id
        return message

    async def pull(self, run_id: int, name: str) -> bytes | None:
        """One object, waited for while its sender uploads it; None where the SuperLink lost it."""
        pause, longest = MISSING_SECONDS
        request = PullObjectRequest(node=self.node, run_id=run_id, object_id=name)
        while True:
            response = await self.connection.ask(request)
            if not response.object_found:
                return None
            if response.object_available:
                return response.object_content
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def push(self, reply: Message) -> None:
        """Announce a reply and upload what the SuperLink lacks of it."""
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree, contents = self.objects(reply)
            header = message_to_proto(remove_content_from_message(reply))
        response = await self.connection.ask(
            PushMessagesRequest(
                node=self.node,
                messages_list=[header],
                message_object_trees=[tree],
                clientapp_runtime_list=[self.think_seconds],
            )
        )
        wanted = set(response.objects_to_push)
        uploads = (
            self.connection.ask(
                PushObjectRequest(
                    node=self.node,
                    run_id=reply.metadata.run_id,
                    object_id=name,
                    object_content=content,
                    session_id=response.session_id,
                )
            )
            for name, content in contents.items()
            if name in wanted
        )
        await asyncio.gather(*uploads)


async def _until(ended: asyncio.Event, seconds: float) -> None:
    """Wait for ``seconds``, or less where it ends."""
    with suppress(TimeoutError):
        await asyncio.wait_for(ended.wait(), seconds)
