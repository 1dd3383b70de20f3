"""Run folders in the middle of a run, and frames of ``flexlora watch`` as plain text."""

from __future__ import annotations

import io
import os
import time

from rich.console import Console

from flexlora.report.watch_view import frame
from flexlora.runs.live_state import Failure, LiveState, process_space, write_live
from pages import client_row, written_run

CAUSE = "Flower error 5: the node has left the federation and was not seen again in time"


def alive(**changes):
    """A moment of a run that this very process would write."""
    now = time.time()
    values = {
        "state": "training",
        "round": 3,
        "num_rounds": 8,
        "asked": 8,
        "heard": 5,
        "failed": 1,
        "replied": ("client_01", "client_02", "client_05", "client_07"),
        "failures": (Failure(client_id="client_03", cause=CAUSE),),
        "classes": {"rank_2": 12, "rank_4": 6},
        "started": now,  # not before this process
        "round_started": now - 2,
        "updated": now,
        "pid": os.getpid(),
        "host": process_space(),
    }
    return LiveState(**{**values, **changes})


def shown(sight, width=80, height=40, **options):
    """A frame as plain text, without colours."""
    text = io.StringIO()
    console = Console(file=text, width=width, height=height, markup=False, highlight=False)
    console.print(frame(sight, width, height, **options))
    return text.getvalue()


def run_in_progress(folder):
    """A run that has done rounds 0 to 2 of 8 and is in its third."""
    refused = client_row("client_09", round=2, status="refused", cause="lora_A holds NaN.")
    path = written_run(folder, (3.5, 2.0, 1.5), num_server_rounds=8)
    with (path / "clients.csv").open("a", encoding="utf-8") as file:
        file.write(f"2,client_09,rank_2,2,none,cpu,10,,,,,,,,refused,{refused['cause']}\n")
    write_live(path, alive())
    return path
