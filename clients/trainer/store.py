"""Finished replies on disk: a request that comes again gets the same bytes, after a restart too.

A file is ``length of the header (8 bytes) | Reply | bytes of the arrays | SHA-256 of all before``,
written beside its place and renamed into it. Its name holds the kind of request, the run, the round
and a digest of everything that the reply depends on. The oldest go first when there are too many
bytes; what a crash has left half written is swept at the next start.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError

from flexlora.clients.trainer.contents import PART_BYTES, data_bytes
from flexlora.clients.trainer.trainer_pb2 import Reply
from flexlora.errors import UserError

__all__ = ["KeptReplies", "KeptReply", "default_folder"]

PREFIX = 8
SUFFIX = hashlib.sha256().digest_size


def default_folder() -> Path:
    """Where a user's programs keep what should outlast a restart."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "flexlora" / "trainer"


@dataclass(frozen=True, kw_only=True)
class KeptReply:
    """One reply as it lies on disk, open: it can be read to its end though it be removed."""

    header: Reply
    file: BinaryIO
    start: int
    size: int

    def parts(self) -> Iterator[bytes]:
        """The arrays' bytes; the file is closed after the last."""
        with self.file as file:
            file.seek(self.start)
            yield from _pieces(file, self.size)

    def close(self) -> None:
        self.file.close()


class KeptReplies:
    """A folder of replies of one trainer, for this user's eyes only.

    Raises:
        UserError: a folder that cannot be used, or that another trainer uses.
    """

    def __init__(self, folder: Path, *, max_bytes: int, max_seconds: float) -> None:
        self.folder, self.max_bytes, self.max_seconds = folder, max_bytes, max_seconds
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            self._lock = (folder / "lock").open("wb")
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"the folder '{folder}' cannot be used: {reason}; give --state another."
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"another trainer keeps its replies in '{folder}'; give --state another folder."
            ) from None
        for partial in folder.glob("*.partial"):
            partial.unlink()
        self.trim()

    def close(self) -> None:
        """Let another trainer have the folder."""
        self._lock.close()

    def find(self, name: str) -> KeptReply | None:
        """The reply kept under ``name``; a damaged file is removed and counts as absent."""
        path = self._path(name)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        try:
            if time.time() - path.stat().st_mtime > self.max_seconds:
                raise ValueError("too old")
            return _read(file)
        except (ValueError, DecodeError, OSError):
            file.close()
            path.unlink(missing_ok=True)
            return None

    def keep(self, name: str, header: Reply, parts: Iterable[bytes]) -> KeptReply:
        """Write a reply, synced before it has its name, and open it; older ones may have to go.

        Raises:
            OSError: no room on the disk; nothing is left behind.
        """
        path = self._path(name)
        partial = path.with_name(f"{path.name}.partial")
        try:
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                _write(file, header, parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        kept = _read(path.open("rb"))
        self.trim()
        return kept

    def trim(self) -> None:
        """Remove what is too old, then the oldest until the rest is within its bytes."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for written, size, path in files:
            if total > self.max_bytes or time.time() - written > self.max_seconds:
                total -= size
                path.unlink(missing_ok=True)

    def held(self) -> tuple[int, int]:
        """How many replies are kept, and their bytes."""
        sizes = [size for _, size, _ in self._files()]
        return len(sizes), sum(sizes)

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each was written, its bytes and its path; one may go while another is looked at."""
        for path in self.folder.glob("*.reply"):
            with suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime, found.st_size, path

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.reply"


def _write(file: BinaryIO, header: Reply, parts: Iterable[bytes]) -> None:
    digest, told = hashlib.sha256(), header.SerializeToString()
    for piece in (len(told).to_bytes(PREFIX, "little"), told):
        digest.update(piece)
        file.write(piece)
    for part in parts:
        digest.update(part)
        file.write(part)
    file.write(digest.digest())


def _read(file: BinaryIO) -> KeptReply:
    """The reply in an open file, all of whose bytes are read once against their digest."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(PREFIX), "little")
    if not 0 <= length <= size - PREFIX - SUFFIX:
        raise ValueError("no header")
    header = Reply.FromString(file.read(length))
    start = PREFIX + length
    if size != start + data_bytes(header.content) + SUFFIX:
        raise ValueError("another size")
    digest = hashlib.sha256()
    file.seek(0)
    for piece in _pieces(file, size - SUFFIX):
        digest.update(piece)
    if file.read(SUFFIX) != digest.digest():
        raise ValueError("another digest")
    return KeptReply(header=header, file=file, start=start, size=size - SUFFIX - start)


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next ``size`` bytes of a file, part by part."""
    while size:
        piece = file.read(min(PART_BYTES, size))
        if not piece:
            raise ValueError("the file ends early")
        size -= len(piece)
        yield piece
