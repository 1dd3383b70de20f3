"""Folders as ``flexlora server init`` and ``flexlora client init`` make them, for the tests."""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
from contextlib import ExitStack

from flexlora.clients.setup.init import client_init
from flexlora.server.init import server_init
from trainers import write_rows

HOSTS = ("fl.example.org", "10.1.2.3")


def both_folders(place):
    """Both folders, the server's with its proxy, and the rows of the node."""
    server_init(folder=str(place / "server"), host=list(HOSTS), port=9092)
    write_rows(place / "rows")
    client_init(**node_of(place))
    return place


def node_of(place, name="node", **changes):
    values = {
        "folder": str(place / name),
        "superlink": "fl.example.org:9092",
        "root_certificates": str(place / "server" / "ca.crt"),
        "data": str(place / "rows"),
        "client_id": "site-a",
        "device": "cpu",
    }
    return values | changes


def remove_proxy_folder(port):
    """Where an nginx that root has started keeps its bodies."""
    shutil.rmtree(f"/var/lib/flexlora-proxy-{port}", ignore_errors=True)


def text_of(path):
    return path.read_text(encoding="utf-8")


def tree(place):
    return {
        str(path.relative_to(place)): (
            path.read_bytes(),
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
        for path in place.rglob("*")
        if path.is_file()
    }


def free_ports(count):
    """The first of ``count`` ports in a row on which nobody listens."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                for number in range(port + 1, port + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
                return port
            except OSError:
                continue


def status(method, port, path, authority):
    """What whoever reaches the port that is open to sites is answered."""
    trusted = ssl.create_default_context(cafile=str(authority))
    connection = http.client.HTTPSConnection("localhost", port, timeout=120, context=trusted)
    try:
        connection.request(method, path, headers={"Content-Type": "application/x-protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()
