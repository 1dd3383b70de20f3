"""What the trainer's owner sees: a running clock on a terminal, a line per event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Teller"]


class Teller:
    """Lines with the time before them; on a terminal also what is being done, and since when.

    Without a console it is silent.
    """

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

    def __enter__(self) -> Teller:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        """One event, whole on its line."""
        self.console.print(f"{time.strftime('%H:%M:%S')}  {text}", soft_wrap=True)

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """A clock beside ``text`` for as long as the block lasts."""
        task = self._progress.add_task(text, total=None)
        try:
            yield
        finally:
            self._progress.remove_task(task)
