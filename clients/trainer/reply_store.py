"""Finished replies on disk: a repeated request gets the same bytes, also after a restart.

    file = length of the header (8 bytes) | Reply | bytes of the arrays | SHA-256 of all before

Files are written under a temporary name and renamed. The name holds the kind of request, the run,
the round and a digest of everything that the reply depends on. Beyond ``max_bytes`` the oldest are
evicted; files that a crash left unfinished are removed at the next start.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError

from flexlora.clients.trainer.content_codec import PART_BYTES, array_bytes
from flexlora.clients.trainer.trainer_pb2 import Reply
from flexlora.errors import UserError

__all__ = ["ReplyStore", "StoredReply", "default_folder"]

PREFIX = 8
SUFFIX = hashlib.sha256().digest_size


def default_folder() -> Path:
    """The user's state folder (XDG)."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "flexlora" / "trainer"


@dataclass(frozen=True, kw_only=True)
class StoredReply:
    """An open reply; it can be read to its end even when its file is removed."""

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


class ReplyStore:
    """The replies of one trainer, in a folder that only this user can read.

    Raises:
        UserError: a folder that cannot be used, or that another trainer has locked.
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
        """Unlock the folder."""
        self._lock.close()

    def find(self, name: str) -> StoredReply | None:
        """The reply stored as ``name``; removes a damaged or expired file."""
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

    def put(self, name: str, header: Reply, parts: Iterable[bytes]) -> StoredReply:
        """Write and sync a reply, rename it into place, open it, and evict old ones.

        Raises:
            OSError: no room on the disk; the partial file is removed.
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
        stored = _read(path.open("rb"))
        self.trim()
        return stored

    def trim(self) -> None:
        """Remove expired replies, then the oldest until the rest fits ``max_bytes``."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for written, size, path in files:
            if total > self.max_bytes or time.time() - written > self.max_seconds:
                total -= size
                path.unlink(missing_ok=True)

    def usage(self) -> tuple[int, int]:
        """The number of replies and their bytes."""
        sizes = [size for _, size, _ in self._files()]
        return len(sizes), sum(sizes)

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time, size and path of each reply; skips those removed meanwhile."""
        for path in self.folder.glob("*.reply"):
            with suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime, found.st_size, path

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.reply"


def _write(file: BinaryIO, header: Reply, parts: Iterable[bytes]) -> None:
    digest, encoded = hashlib.sha256(), header.SerializeToString()
    for piece in chain((len(encoded).to_bytes(PREFIX, "little"), encoded), parts):
        digest.update(piece)
        file.write(piece)
    file.write(digest.digest())


def _read(file: BinaryIO) -> StoredReply:
    """The reply in an open file; reads the whole file once to check its digest."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(PREFIX), "little")
    if not 0 <= length <= size - PREFIX - SUFFIX:
        raise ValueError("no header")
    header = Reply.FromString(file.read(length))
    start = PREFIX + length
    if size != start + array_bytes(header.content) + SUFFIX:
        raise ValueError("another size")
    digest = hashlib.sha256()
    file.seek(0)
    for piece in _pieces(file, size - SUFFIX):
        digest.update(piece)
    if file.read(SUFFIX) != digest.digest():
        raise ValueError("another digest")
    return StoredReply(header=header, file=file, start=start, size=size - SUFFIX - start)


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next ``size`` bytes of a file, part by part."""
    while size:
        piece = file.read(min(PART_BYTES, size))
        if not piece:
            raise ValueError("the file ends early")
        size -= len(piece)
        yield piece
