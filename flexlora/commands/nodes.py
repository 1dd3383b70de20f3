"""The commands of a deployment: ``flexlora client ...`` on a node, ``flexlora server ...``."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_node_commands"]


def add_node_commands(commands: Any) -> None:
    """Put ``client`` and ``server`` beside the other commands."""
    client = commands.add_parser("client", help="what runs on an edge node")
    does = client.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _client_init(does)
    _client_serve(does)
    _client_health(does)
    server = commands.add_parser("server", help="what runs where the nodes meet")
    _server_init(server.add_subparsers(title="commands", metavar="COMMAND", required=True))


def _client_init(does: Any) -> None:
    init = does.add_parser("init", help="write a ready folder: keys, scripts, units, steps")
    init.add_argument("folder", metavar="DIR", help="folder to make; nothing is overwritten")
    init.add_argument("--superlink", metavar="HOST:PORT", required=True, help="the server")
    init.add_argument(
        "--root-certificates", metavar="CA.crt", required=True, help="ca.crt of the server's folder"
    )
    init.add_argument("--data", metavar="DIR", required=True, help="this node's data folder")
    init.add_argument("--model", metavar="MODEL", default="embedded", help="folder or hub name")
    init.add_argument("--client-id", metavar="NAME", default="", help="this node's name")
    init.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    init.add_argument("--quantization", default="", help="none, 8bit or nf4 (default: what fits)")
    init.add_argument("--memory-limit", metavar="SIZE", default="", help="bytes to use, like 6GiB")
    init.add_argument("--port", type=int, default=9094, help="of this node on loopback (9094)")
    init.set_defaults(run=_run_client_init)


def _server_init(does: Any) -> None:
    init = does.add_parser("init", help="write a ready folder: certificates, scripts, units, steps")
    init.add_argument("folder", metavar="DIR", help="folder to make; nothing is overwritten")
    init.add_argument(
        "--host", metavar="NAME", action="append", default=[], help="how nodes reach this machine"
    )
    init.add_argument("--port", type=int, default=9092, help="that nodes reach (default: 9092)")
    init.add_argument("--days", type=int, default=825, help="that the certificate lasts (825)")
    init.add_argument("--proxy", default="nginx", help="nginx or none (default: nginx)")
    init.set_defaults(run=_run_server_init)


def _client_serve(does: Any) -> None:
    serve = does.add_parser("serve", help="keep the base loaded and train for ClientApps here")
    serve.add_argument("--model", metavar="MODEL", required=True, help="folder, hub name, embedded")
    serve.add_argument("--data", metavar="DIR", required=True, help="this node's data folder")
    serve.add_argument("--socket", metavar="PATH", default="", help="Unix socket to listen on")
    serve.add_argument("--group", default="", help="group that may open the socket too")
    serve.add_argument("--client-id", metavar="NAME", default="", help="this node's name")
    serve.add_argument("--quantization", default="none", help="none, 8bit or nf4 (default: none)")
    serve.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    serve.add_argument("--memory-limit", metavar="SIZE", default="", help="bytes to use, like 6GiB")
    serve.add_argument("--state", metavar="DIR", default="", help="where finished replies are kept")
    serve.add_argument("--keep", metavar="SIZE", default="2GiB", help="bytes of them at most")
    serve.add_argument("--keep-hours", type=float, default=24.0, metavar="N", help="and how long")
    serve.add_argument("--max-request", metavar="SIZE", default="2GiB", help="largest request")
    serve.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="for a turn")
    serve.add_argument("--grace", type=float, default=120.0, metavar="SECONDS", help="to finish")
    serve.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a model or engine key"
    )
    serve.set_defaults(run=_run_serve)


def _client_health(does: Any) -> None:
    health = does.add_parser("health", help="how the trainer on this machine is")
    health.add_argument("--socket", metavar="PATH", default="", help="Unix socket it listens on")
    health.set_defaults(run=_run_health)


def _values(options: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if key != "run"}


def _run_client_init(options: argparse.Namespace) -> int:
    from flexlora.clients.setup.init import ClientInit, client_init

    return client_init(ClientInit(**_values(options)))


def _run_server_init(options: argparse.Namespace) -> int:
    from flexlora.server.init import ServerInit, server_init

    return server_init(ServerInit(**_values(options)))


def _run_serve(options: argparse.Namespace) -> int:
    from flexlora.clients.trainer.command import ServeOptions, serve

    return serve(ServeOptions(**_values(options)))


def _run_health(options: argparse.Namespace) -> int:
    from flexlora.clients.trainer.command import health_command

    return health_command(options.socket)
