"""``flexlora watch RUN``: follow a run from its folder alone.

A terminal gets a display redrawn twice a second; any other output gets a line per round. The folder
may be written by ``flexlora simulate``, by ``flwr run`` or on another machine (sshfs). The exit
status is 0 if the run finished and 1 if it failed, stopped or disappeared.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from flexlora.report.snapshots import Snapshot, SnapshotReader, find_run
from flexlora.report.watch_view import frame, heading, last_line, round_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["watch"]

POLL_SECONDS = 0.5
INTERRUPTED = 130


def watch(target: str | None, *, once: bool, console: Console) -> int:
    """Show the run in ``target`` (default: the newest under ``runs``) until it is over.

    Raises:
        UserError: ``target`` is no run folder.
    """
    reader = SnapshotReader(find_run(target))
    # Characters outside the output's encoding become question marks.
    reconfigure = getattr(console.file, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    if once:
        console.print(_picture(reader(), console, console.height))
        return 0
    try:
        last = _redraw(reader, console) if console.is_terminal else _print_rounds(reader, console)
    except KeyboardInterrupt:
        print("flexlora: no longer watching; the run is left alone.", file=sys.stderr)
        return INTERRUPTED
    return 0 if last.finished else 1


def _picture(snapshot: Snapshot, console: Console, height: int) -> RenderableType:
    return frame(snapshot, console.width, height, ascii_only=console.options.ascii_only)


def _redraw(reader: SnapshotReader, console: Console) -> Snapshot:
    """Redraw until the run is over; the last picture stays on the screen."""
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        while True:
            snapshot = reader()
            live.update(_picture(snapshot, console, console.height - 1), refresh=True)
            if snapshot.over:
                return snapshot
            time.sleep(POLL_SECONDS)


def _print_rounds(reader: SnapshotReader, console: Console) -> Snapshot:
    """Print a line per round, one when the run stops responding, and its end."""
    printed, silent = -1, ""
    snapshot = reader()
    console.print(heading(snapshot), soft_wrap=True)
    while True:
        printed = min(printed, snapshot.records.last_round)  # a resume rewinds to a whole round
        for row in snapshot.records.rounds:
            if int(str(row["round"])) > printed:
                printed = int(str(row["round"]))
                console.print(round_line(snapshot, row), soft_wrap=True)
        if snapshot.over:
            console.print(last_line(snapshot), soft_wrap=True)
            return snapshot
        kind = snapshot.trouble.partition(" for ")[0]  # without the seconds, which change
        if kind and kind != silent:
            console.print(snapshot.trouble, soft_wrap=True)
        silent = kind
        time.sleep(POLL_SECONDS)
        snapshot = reader()
