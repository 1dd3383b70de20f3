"""``flexlora server run``: one federation of a server folder, run after run, unattended."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Annotated

from typer import Argument

from flexlora.commands.options import PATH
from flexlora.runs.lock import only_one
from flexlora.server.following.flower_commands import FlowerCommands
from flexlora.server.following.follower import Follower
from flexlora.server.following.metrics import follower_endpoint, free_port
from flexlora.server.following.place import APP, Place
from flexlora.server.settings import check_config

__all__ = ["server_run"]


class _Ended(BaseException):
    """SIGTERM: the service is stopped or the machine goes down."""


def server_run(
    folder: Annotated[
        str, Argument(metavar="DIR", click_type=PATH, help="what `flexlora server init` made")
    ],
    name: Annotated[
        str, Argument(metavar="[FEDERATION]", help="which of the server's (default: app)")
    ] = APP,
) -> int:
    """Submit a run, follow it, and start it again with ``resume`` where it died.

    Returns 0 where the run (the last of a schedule) has finished, 1 where it failed. Ctrl-C stops
    the run too; SIGTERM leaves it to itself, and the next ``server run`` follows it again.

    Raises:
        UserError: no such folder or federation, a configuration that cannot be, a port that is
            taken, another follower of the same federation.
    """
    place = Place.of(folder, name)
    config = place.config()
    check_config(config)
    follower = Follower(
        place,
        FlowerCommands.of(place),
        _say,
        metrics_port=free_port if config.server.metrics_port else lambda: 0,
    )
    signal.signal(signal.SIGTERM, _end)
    with only_one(place.notes / f"{name}.lock", f"the federation {name} of '{folder}'"):
        try:
            with follower_endpoint(config, follower):
                return follower.run()
        except KeyboardInterrupt:
            follower.stop()
            raise
        except _Ended:
            if follower.standing.run_id:
                _say(f"run {follower.standing.run_id} goes on; the next `server run` follows it.")
            return 0


def _say(line: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", flush=True)


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended
