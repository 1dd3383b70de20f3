"""Each private name of Flower that ``flower_private.py`` passes on, used as the server uses it."""

from __future__ import annotations

import sqlite3
from importlib import metadata

import httpx
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.heartbeat import make_task_heartbeat_fn_http
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient

from flexlora.deploy.request_watch import RequestWatch, watch_requests
from flexlora.server.transport import flower_private
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


def test_a_server_error_at_the_heartbeat_of_a_serverapp_is_one_that_flower_retries():
    """Flower's own heartbeat function, over its own client: at a 500 it raises, and is not called
    again; at a 503 it says False, and is."""

    class Interceptor:
        def intercept(self, context, call_next):
            return httpx.Response(500, request=context.request)

    class Client(RuntimeHttpClient):
        _send = RuntimeHttpClient._send

    client = Client("http://127.0.0.1:1", interceptors=[Interceptor()])
    beat = make_task_heartbeat_fn_http(client)
    with pytest.raises(httpx.HTTPStatusError):
        beat()
    watch_requests(Client, RequestWatch(), flower_private.TASK_HEARTBEAT)
    assert beat() is False
    with pytest.raises(httpx.HTTPStatusError):
        client.AcquireTask(AcquireTaskRequest())
    assert issubclass(FleetHttpClient, flower_private.ProtobufClient)


def test_the_superlinks_database_is_waited_for_longer(monkeypatch):
    from flwr.supercore import sql_mixin

    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    before = dict(sql_mixin.SQLITE_PRAGMAS)
    assert before["busy_timeout"] == "5000" and before["journal_mode"] == "WAL"
    flower_private.wait_for_database()
    assert dict(sql_mixin.SQLITE_PRAGMAS) == before | {"busy_timeout": "20000"}
    connection = sqlite3.connect(":memory:")
    sql_mixin._set_sqlite_pragmas(connection, None)
    assert connection.execute("PRAGMA busy_timeout").fetchone() == (20000,)


@pytest.mark.parametrize("name", ["flower-superlink", "flower-superexec"])
def test_the_programs_are_those_that_flower_installs(name):
    (found,) = metadata.entry_points(group="console_scripts", name=name)
    assert flower_private.program(name) is found.load()
