"""Each private name of Flower that ``flower_private.py`` passes on, used as the server uses it."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message, RecordDict

from flexlora.server.transport.flower_private import (
    EXPIRED_CODES,
    LOST_CODES,
    NODE_UNAVAILABLE,
    ObjectPushError,
    Run,
    act_as_server,
    set_message_id,
    set_sender,
)


def test_the_codes_are_the_numbers_that_the_documents_name():
    assert {3, 4} == EXPIRED_CODES and {3, 4, 5, 8} == LOST_CODES and NODE_UNAVAILABLE == 5


def test_a_broken_upload_is_an_exception_of_its_own():
    with pytest.raises(ObjectPushError, match="object with ID 'o'"):
        raise ObjectPushError("o", 7, "s")


def test_a_run_needs_an_id_only():
    assert Run.create_empty(run_id=7).run_id == 7


def test_a_message_is_made_in_the_name_of_the_run():
    act_as_server(run_id=7)
    metadata = Message(RecordDict(), dst_node_id=3, message_type="query").metadata
    assert (metadata.run_id, metadata.src_node_id, metadata.dst_node_id) == (7, 0, 3)


def test_ids_and_senders_can_be_set_and_are_read_back():
    act_as_server(run_id=7)
    message = Message(RecordDict(), dst_node_id=3, message_type="query")
    set_message_id(message, "m-1")
    assert message.metadata.message_id == "m-1"
    reply = Message(Error(code=5, reason="gone"), reply_to=message)
    assert reply.metadata.reply_to_message_id == "m-1"
    set_sender(reply, 9, "m-2")
    assert (reply.metadata.src_node_id, reply.metadata.reply_to_message_id) == (9, "m-2")
    set_sender(reply, 4)
    assert (reply.metadata.src_node_id, reply.metadata.reply_to_message_id) == (4, "m-2")
