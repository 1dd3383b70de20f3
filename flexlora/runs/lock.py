"""``flock`` on ``config.toml``, so that only one process writes a run folder.

Where the system or the file system has no such locks, this does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexlora.errors import UserError
from flexlora.runs.live_state import read_live

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

__all__ = ["check_idle", "exclusive_lock", "only_one"]


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Lock the run in ``folder`` for this process until the end of the block.

    Raises:
        UserError: another process writes it.
    """
    with (folder / "config.toml").open("rb") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            live = read_live(folder)
            who = f"process {live.pid}" if live is not None and live.pid else "a process"
            raise UserError(
                f"'{folder}' is a run that {who} is still writing; wait for it (`flexlora watch "
                f"{folder}`), stop it, or give another --out."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


@contextmanager
def only_one(file: Path, what: str) -> Iterator[None]:
    """Lock ``file``, which is made, for this process until the end of the block.

    Raises:
        UserError: another process has the lock: somebody runs ``what`` already.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as held:
        try:
            if fcntl is not None:
                fcntl.flock(held.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{what} is run by another process; stop that one first.") from None
        except OSError:  # a file system without locks
            pass
        yield


def check_idle(folder: Path) -> None:
    """
    Raises:
        UserError: another process is writing the run in ``folder``.
    """
    with exclusive_lock(folder):
        pass
