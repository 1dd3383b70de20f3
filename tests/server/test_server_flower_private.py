"""Each private name of Flower that ``flower_private.py`` passes on, used as the server uses it."""

from __future__ import annotations

import inspect
import sqlite3
from importlib import metadata

import httpx
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.supercore.heartbeat import make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient

from flexlora.deploy.request_watch import RequestWatch, watch_requests
from flexlora.server.transport import flower_private
from flexlora.server.transport.flower_private import (
    EXPIRED_CODES,
    LOST_CODES,
    NODE_UNAVAILABLE,
    UNREADABLE,
    ObjectGone,
    ObjectPushError,
    ObjectTooLarge,
    Run,
    act_as_server,
    confirm,
    error_reply,
    inflate_object_from_contents,
    is_outage,
    object_head,
    poll,
    pull_object,
    pulls_by_itself,
    set_message_id,
    set_sender,
    tried_once,
)
from superlink_store import Store, content, http_grid, messages, status


def test_the_codes_are_the_numbers_that_the_documents_name():
    assert {3, 4} == EXPIRED_CODES and {3, 4, 5, 8} == LOST_CODES and NODE_UNAVAILABLE == 5
    assert UNREADABLE == 0


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
        _send = inspect.unwrap(RuntimeHttpClient._send)  # another test may have wrapped it

    client = Client("http://127.0.0.1:1", interceptors=[Interceptor()])
    beat = make_task_heartbeat_fn_http(client)
    with pytest.raises(httpx.HTTPStatusError):
        beat()
    watch_requests(Client, RequestWatch())
    assert beat() is False
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


def test_requests_pass_only_the_middleware_that_looks_at_them(monkeypatch):
    from flwr.supercore.error import FlowerError
    from flwr.supercore.routers.runtime.tracing import RuntimeTracingMiddleware
    from flwr.superlink.routers.control import middlewares
    from flwr.superlink.routers.fleet.middlewares import FleetEventLogMiddleware
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    control = [getattr(middlewares, name) for name in flower_private.CONTROL_MIDDLEWARE]
    layers = [*control, RuntimeTracingMiddleware, FleetEventLogMiddleware]
    passed = []
    for layer in layers:
        monkeypatch.setattr(layer, "__call__", layer.__call__)  # and so again afterwards

        async def dispatch(self, request, call_next, name=layer.__name__, inner=layer.dispatch):
            passed.append((name, request.url.path))
            return await inner(self, request, call_next)

        monkeypatch.setattr(layer, "dispatch", dispatch)

    def passed_by(path, plugin=None):
        """The layers of a request; a control path is refused, as nobody can be authenticated."""
        passed.clear()
        routes = [Route(path, lambda request: PlainTextResponse("here"), methods=["POST"])]
        app = Starlette(routes=routes, middleware=[Middleware(layer) for layer in layers])
        app.state.fleet_event_log_plugin = plugin
        if path.startswith("/v1/control/"):
            with pytest.raises(FlowerError, match="account authentication"):
                TestClient(app).post(path)
        else:
            assert TestClient(app).post(path).text == "here"
        assert {where for _, where in passed} <= {path}
        return [name for name, _ in passed]

    everything = [layer.__name__ for layer in layers]
    refused = everything[:2]  # the second authenticates
    assert passed_by("/v1/fleet/x") == everything and passed_by("/v1/control/x") == refused
    flower_private.skip_idle_middleware()
    assert passed_by("/v1/fleet/x") == [] and passed_by("/v1/control/x") == refused
    assert passed_by("/v1/fleet/x", plugin=object()) == ["FleetEventLogMiddleware"]
    monkeypatch.setenv("FLWR_TRACING_ENABLED", "1")
    assert passed_by("/v1/fleet/x") == ["RuntimeTracingMiddleware"]


def test_a_run_that_goes_on_is_looked_up_once_a_second_and_one_that_ended_at_every_request(
    monkeypatch,
):
    from flwr.superlink.servicer.fleet import fleet_handlers

    now, looked_up, ended = [100.0], [], {}

    def check(run_id, statuses, state):
        assert (statuses, state) == (["finished"], "state")
        looked_up.append(run_id)
        return ended.get(run_id)

    monkeypatch.setattr(fleet_handlers, "check_abort", check)
    monkeypatch.setattr(flower_private.time, "monotonic", lambda: now[0])
    flower_private.remember_running()

    def asked(run_id):
        return fleet_handlers.check_abort(run_id, ["finished"], "state")

    assert [asked(1), asked(1), asked(2), asked(1)] == [None] * 4 and looked_up == [1, 2]
    ended[1] = "Run is finished."
    now[0] += flower_private.RUNNING_SECONDS
    assert [asked(1), asked(1)] == ["Run is finished."] * 2 and looked_up == [1, 2, 1, 1]


def test_flowers_handlers_look_a_run_up_as_it_is_replaced_here():
    import inspect

    from flwr.superlink.servicer.fleet import fleet_handlers

    assert list(inspect.signature(fleet_handlers.check_abort).parameters) == [
        "run_id",
        "abort_status_list",
        "state",
    ]
    source = inspect.getsource(fleet_handlers)
    one = "[Status.PENDING, Status.STARTING, Status.FINISHED],"
    assert source.count("check_abort(") == source.count(one) > 4


@pytest.mark.parametrize("name", ["flower-superlink", "flower-superexec"])
def test_the_programs_are_those_that_flower_installs(name):
    (found,) = metadata.entry_points(group="console_scripts", name=name)
    assert flower_private.program(name) is found.load()


def test_a_reply_is_handed_over_with_its_objects_pulled_and_confirmed():
    store = Store()
    grid = http_grid(store)
    (pending,) = messages(1)
    store.reply(pending.message, content(50), missing=("Array",))
    (handed,) = poll(grid, ["m-0"])
    assert handed.answers == "m-0" and handed.objects[0] == handed.reply_id
    assert len(handed.objects) == 6 and handed.whole is None
    parts = {name: pull_object(grid, name, 1000) for name in handed.objects}
    assert list(parts.values()).count(None) == 1  # not uploaded yet
    with pytest.raises(ObjectGone):
        pull_object(grid, "f" * 64, 1000)
    store.objects[handed.reply_id] = b"x" * 10_000
    with pytest.raises(ObjectTooLarge, match="an object of 10,080 bytes"):
        pull_object(grid, handed.reply_id, 1000)
    assert grid._runtime_client._client.event_hooks["response"] == []
    confirm(grid, handed.reply_id)
    assert store.confirmed == [handed.reply_id]


def test_flowers_client_repeats_a_503_without_end_and_is_tried_once_here():
    grid = http_grid(Store())
    assert pulls_by_itself(grid)
    with tried_once(grid):
        grid.store.failures = [status(503)]
        with pytest.raises(httpx.HTTPStatusError):
            poll(grid, ["m-0"])
    assert grid._runtime_client._retry_invoker.max_tries is None


def test_outages_are_told_from_faults():
    gone = [status(500), status(503), status(429), httpx.ReadTimeout("x"), httpx.ConnectError("x")]
    assert all(map(is_outage, gone))
    assert is_outage(ValueError("Invalid protobuf response payload"))
    ours = [status(403), status(404), ValueError("x"), UnicodeDecodeError("a", b"", 0, 1, "x")]
    assert not any(map(is_outage, ours))


def test_an_objects_head_names_its_type_and_children_and_an_array_its_chunks():
    act_as_server(run_id=7)
    message = Message(content(50), dst_node_id=3, message_type="train")
    parts = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    kinds = [object_head(part)[0] for part in parts.values()]
    assert sorted(kinds) == [
        "Array",
        "ArrayChunk",
        "ArrayRecord",
        "ConfigRecord",
        "Message",
        "RecordDict",
    ]
    (place,) = [k for k, kind in enumerate(kinds) if kind == "Array"]
    array = list(parts)[place]
    assert parts[array].split(b"\0", 1)[1].endswith(b'"arraychunk_ids": [0]}')
    other = Array("uint8", (1,), "s", b"z")
    made = inflate_object_from_contents(message.object_id, dict(parts), objects={array: other})
    assert isinstance(made.content["a"], ArrayRecord) and made.content["a"]["a"] == other


def test_an_error_can_stand_in_the_place_of_a_reply():
    (pending,) = messages(1)
    reply = error_reply(pending.metadata, UNREADABLE, "why")
    assert (reply.error.code, reply.error.reason) == (0, "why")
    assert reply.metadata.reply_to_message_id == "m-0" and reply.metadata.src_node_id == 10
