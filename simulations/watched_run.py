"""One run as a person watches it: tables while it goes, a summary and a page when it is done."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from flexlora.config.resolve import Config
from flexlora.errors import one_line
from flexlora.report import write_report
from flexlora.runs.folder import RunFolder
from flexlora.simulations.simulate import resume, simulate
from flexlora.simulations.terminal import TerminalObserver

__all__ = ["leave_report", "watched_run"]


def watched_run(
    config: Config, out: Path, *, console: Console, overwrite: bool = False, go_on: bool = False
) -> None:
    """Run ``config`` into ``out``, or go on with the run there under its own configuration.

    Raises:
        UserError: see ``simulate`` and ``resume``.
    """
    if go_on:
        _, config = RunFolder.open(out)
    with TerminalObserver(console, personal_rank=config.personal.rank) as observer:
        if go_on:
            resume(out, observer=observer)
        else:
            simulate(config, out, observer=observer, overwrite=overwrite)
    observer.summary(RunFolder(out).metrics())
    leave_report(out, console)


def leave_report(out: Path, console: Console) -> None:
    """RUN/report.html of a run that is done: whatever is wrong with the page, the run stands."""
    try:
        page = write_report(out)
    except Exception as error:
        print(
            f"flexlora: the run is whole, but its report was not written ({one_line(error)}).",
            file=sys.stderr,
        )
    else:
        console.print(f"\nReport: {page}", soft_wrap=True)
