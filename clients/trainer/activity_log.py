"""The trainer's output: one line per event, and on a terminal a clock beside what is running."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["ActivityLog"]


class ActivityLog:
    """Timestamped lines on a console; silent without one."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> ActivityLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        """Print one event, unwrapped."""
        self.console.print(f"{time.strftime('%H:%M:%S')}  {text}", soft_wrap=True)

    @contextmanager
    def running(self, text: str) -> Iterator[None]:
        """Show a clock beside ``text`` for as long as the block lasts."""
        task = self._progress.add_task(text, total=None)
        try:
            yield
        finally:
            self._progress.remove_task(task)
