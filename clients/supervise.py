"""``flexlora client supervise -- flower-supernode ...``: keep a node's Flower programs running.

The command is Flower's own, behind ``--``. The supervisor starts ``python -m
flexlora.clients.supervise PROGRAM ...``, which runs Flower's program in this module's ``main``.
"""

from __future__ import annotations

import sys
from typing import Annotated

from typer import Argument

from flexlora.deploy.request_watch import RequestWatch, watch_requests
from flexlora.deploy.supervised import run_supervised
from flexlora.deploy.supervisor import supervise_module

__all__ = ["supervise"]

PROGRAMS = ("flower-supernode", "flower-superexec")


def supervise(
    command: Annotated[
        list[str], Argument(metavar="-- PROGRAM ...", help="flower-supernode or flower-superexec")
    ],
) -> int:
    """Run Flower's program until SIGTERM or Ctrl-C, and start it again when it stops working.

    Raises:
        UserError: another program.
    """
    return supervise_module("flexlora.clients.supervise", PROGRAMS, command)


def main() -> None:
    """The program in ``sys.argv[1]`` with the arguments after it."""
    from flexlora.clients.setup import flower_private

    sys.argv = sys.argv[1:]
    watch = RequestWatch()
    watch_requests(flower_private.ProtobufClient, watch)
    # A thread of a SuperNode that dies is its heartbeat.
    run_supervised(flower_private.PROGRAMS[sys.argv[0]], trouble=watch.trouble, every_thread=True)


if __name__ == "__main__":
    main()
