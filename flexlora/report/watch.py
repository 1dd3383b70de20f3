"""``flexlora watch RUN``: a run as it goes, from its folder alone.

On a terminal a picture that is drawn again; elsewhere a line per round. The run knows nothing of
it: the folder may be that of ``flexlora simulate`` in another terminal, of ``flwr run``, or lie on
another machine (sshfs). The status is 0 when the run came to its end, and 1 when it did not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from flexlora.report.watch_sight import Look, Sight, chosen
from flexlora.report.watch_view import frame, heading, last_word, round_line

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["watch"]

POLL_SECONDS = 0.5
INTERRUPTED = 130


def watch(target: str | None, *, once: bool, console: Console) -> int:
    """Show the run in ``target`` (default: the newest under ``runs``) until it is over.

    Raises:
        UserError: it is no run folder.
    """
    look = Look(chosen(target))
    _forgive(console)
    if once:
        console.print(frame(look(), console.width, console.height, ascii_only=_ascii(console)))
        return 0
    try:
        sight = _redrawn(look, console) if console.is_terminal else _told(look, console)
    except KeyboardInterrupt:
        print("flexlora: no longer watching; the run is left alone.", file=sys.stderr)
        return INTERRUPTED
    return 0 if sight.finished else 1


def _forgive(console: Console) -> None:
    """A letter that the output cannot show, in a client's name say, becomes a question mark."""
    reconfigure = getattr(console.file, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _ascii(console: Console) -> bool:
    return console.options.ascii_only


def _redrawn(look: Callable[[], Sight], console: Console) -> Sight:
    """A picture that follows the run; the last one stays."""
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        while True:
            sight = look()
            height = console.height - 1
            shown = frame(sight, console.width, height, ascii_only=_ascii(console))
            live.update(shown, refresh=True)
            if sight.over:
                return sight
            time.sleep(POLL_SECONDS)


def _told(look: Callable[[], Sight], console: Console) -> Sight:
    """A line per round, one when the run falls silent, and its last word."""
    done, trouble = -1, ""
    sight = look()
    console.print(heading(sight), soft_wrap=True)
    while True:
        if sight.records.last_round < done:  # a resume went back to the last whole round
            done = sight.records.last_round
        for row in sight.records.rounds:
            if int(str(row["round"])) > done:
                done = int(str(row["round"]))
                console.print(round_line(sight, row), soft_wrap=True)
        if sight.over:
            console.print(last_word(sight), soft_wrap=True)
            return sight
        kind = sight.trouble.partition(" for ")[0]
        if kind and kind != trouble:
            console.print(sight.trouble, soft_wrap=True)
        trouble = kind
        time.sleep(POLL_SECONDS)
        sight = look()
