"""The trainer's Unix socket: its path, its permissions, and whether a process listens on it.

Whoever may write in the socket's folder can replace the socket and receive the node's updates. So
the folder, and every folder above it, must belong to the trainer's user or to root, and nobody else
may write there (above it, a sticky folder such as /tmp is accepted).
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from flexlora.config.paths import expanded
from flexlora.errors import UserError

__all__ = [
    "NODE_KEY",
    "VARIABLE",
    "check_folder",
    "check_free",
    "connection_error",
    "default_socket",
    "open_to",
    "remove",
    "trainer_socket",
]

NODE_KEY = "trainer-socket"  # in a node's config
VARIABLE = "FLEXLORA_TRAINER_SOCKET"
LONGEST = 107  # bytes of a path in Linux's sockaddr_un, without the final zero
CONNECT_SECONDS = 5.0
DEAD = "no process listens there any more"


def default_socket() -> Path:
    """In the user's runtime folder, or in the home folder where there is none."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) if runtime else Path.home() / ".local" / "state"
    return folder / "flexlora" / "trainer.sock"


def trainer_socket(node_config: Mapping[str, object]) -> Path | None:
    """The socket of this node's trainer, None where it has none.

    The environment variable is ignored in simulation, where many nodes share a machine.

    Raises:
        UserError: a path that is not absolute: a ClientApp may be started in any folder.
    """
    given = node_config.get(NODE_KEY)
    if given is None and "partition-id" not in node_config:
        given = os.environ.get(VARIABLE) or None
    if given is None:
        return None
    path = Path(expanded(str(given)))
    if not path.is_absolute():
        raise UserError(f"{NODE_KEY} is '{given}', expected an absolute path.")
    return path


def connection_error(path: Path) -> str:
    """Why no connection to a socket can be made; "" if one can."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(CONNECT_SECONDS)
            probe.connect(str(path))
    except FileNotFoundError:
        return "there is no such socket"
    except ConnectionRefusedError:
        return DEAD
    except PermissionError:
        return "this user may not open it"
    except (TimeoutError, BlockingIOError):
        return "a process holds it and takes no connection"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return ""


def check_folder(path: Path) -> None:
    """Make the socket's folder (mode 0700) if it is missing, and check who may write there.

    Raises:
        UserError: a path too long for a socket, or a folder in which others could replace it.
    """
    if len(os.fsencode(path)) > LONGEST:
        raise UserError(
            f"--socket has {len(os.fsencode(path))} bytes, expected {LONGEST} at most: that is all "
            "the system takes for a socket; give a shorter path."
        )
    folder = path.parent
    try:
        if not folder.exists():
            folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the socket's folder '{folder}' cannot be made: {reason}.") from None
    for place in (folder.resolve(), *folder.resolve().parents):
        _check_place(place, is_folder=place == folder.resolve())


def _check_place(place: Path, *, is_folder: bool) -> None:
    found = place.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise UserError(f"'{place}' is not a folder; give --socket a path inside one.")
    if found.st_uid not in (0, os.geteuid()):
        raise UserError(
            f"'{place}' belongs to another user (uid {found.st_uid}), who could replace the "
            "socket; give --socket a path in a folder of your own."
        )
    sticky = bool(found.st_mode & stat.S_ISVTX) and not is_folder
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        raise UserError(
            f"others may write in '{place}' (mode {stat.S_IMODE(found.st_mode):04o}) and could "
            f"replace the socket; chmod go-w it, or give --socket a path in a folder of your own."
        )


def check_free(path: Path) -> None:
    """Remove a socket on which no process listens.

    Raises:
        UserError: a process listens there, or the file is no socket.
    """
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise UserError(f"'{path}' is there and is not a socket; give --socket another path.")
    why = connection_error(path)
    if not why:
        raise UserError(
            f"a trainer listens on '{path}' already; stop it, or give --socket another path."
        )
    if why != DEAD:
        raise UserError(f"'{path}' is taken: {why}; remove it, or give --socket another path.")
    path.unlink()


@contextmanager
def open_to(path: Path, group: str) -> Iterator[None]:
    """Sockets made inside get mode 0600; at the end ``path`` is opened to ``group`` too.

    Raises:
        UserError: no such group, or one that this user may not give files to.
    """
    number = group_number(group) if group else None
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
    if number is None:
        return
    try:
        os.chown(path, -1, number)
        path.chmod(0o660)
    except OSError as error:
        path.unlink(missing_ok=True)
        reason = error.strerror or error
        raise UserError(f"the socket cannot be given to group '{group}': {reason}.") from None


def group_number(group: str) -> int:
    """The number of a group by its name, or by the number itself."""
    import grp

    try:
        return int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise UserError(f"--group is '{group}', which is not a group of this machine.") from None


def remove(path: Path) -> None:
    """Remove the socket, if it is still there."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
