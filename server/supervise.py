"""``flexlora server supervise -- flower-superlink ...``: keep the server's Flower programs running.

The command is Flower's own, behind ``--``. The supervisor starts ``python -m
flexlora.server.supervise PROGRAM ...``, which runs Flower's program in this module's ``main``.
"""

from __future__ import annotations

import gc
import sys
from typing import Annotated

from typer import Argument

from flexlora.deploy.request_watch import RequestWatch, watch_requests
from flexlora.deploy.supervised import run_supervised
from flexlora.deploy.supervisor import supervise_module

__all__ = ["supervise"]

PROGRAMS = ("flower-superlink", "flower-superexec")


def supervise(
    command: Annotated[
        list[str], Argument(metavar="-- PROGRAM ...", help="flower-superlink or flower-superexec")
    ],
) -> int:
    """Run Flower's program until SIGTERM or Ctrl-C, and start it again when it stops working.

    Raises:
        UserError: another program.
    """
    return supervise_module("flexlora.server.supervise", PROGRAMS, command)


def main() -> None:
    """The program in ``sys.argv[1]`` with the arguments after it."""
    from flexlora.server.transport import flower_private
    from flexlora.server.transport.admission import limit_open_requests

    sys.argv = sys.argv[1:]
    flower_private.wait_for_database()
    if sys.argv[0] == "flower-superlink":
        flower_private.skip_idle_middleware()
        flower_private.remember_running()
        limit_open_requests(flower_private.outermost_middleware())
        gc.set_threshold(50_000, 20, 50)  # a request leaves little garbage, but makes many objects
    watch = RequestWatch()
    watch_requests(flower_private.ProtobufClient, watch)
    run_supervised(flower_private.program(sys.argv[0]), trouble=watch.trouble)


if __name__ == "__main__":
    main()
