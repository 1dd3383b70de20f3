"""Submit a run to a real SuperLink and take its ServerApp's place in this process."""

from __future__ import annotations

import time
from contextlib import contextmanager

import tomli_w
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from real_superlink import flwr

APP = {
    "project": {"name": "flexlora", "version": "0.0.0", "license": "Apache-2.0"},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "flexlora",
                "fab-include": ["pyproject.toml"],
                "components": {
                    "serverapp": "flexlora.server.app:app",
                    "clientapp": "flexlora.clients.app:app",
                },
                "config": {},
            }
        }
    },
}


@contextmanager
def server_app_grid(folder, port, environment):
    """The grid of a new run, with heartbeats; the SuperLink has ``--isolation process``."""
    app = folder / "app"
    app.mkdir()
    (app / "pyproject.toml").write_bytes(tomli_w.dumps(APP).encode())
    flwr(environment, "run", str(app), "own")
    address = f"127.0.0.1:{port}"
    versions = RuntimeVersionHttpInterceptor(component_name="flwr-superexec")
    executor = RuntimeHttpClient.from_server_address(address, True, None, [versions])
    wanted = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
    deadline = time.monotonic() + 60.0
    while not (task := executor.AcquireTask(wanted)).token:
        assert time.monotonic() < deadline, "no task to take"
        time.sleep(0.1)
    executor.close()
    grid = HttpGrid(address, insecure=True, token=task.token)
    beats = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
    beats.start()
    try:
        given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        yield grid
    finally:
        beats.stop()
        grid.close()
