"""Spills tensors beyond ``held_bytes`` to an unlinked temporary file.

A spilled tensor is read back with the same bits into newly allocated memory. The file is deleted
with the ``Shelf`` or at the end of the process, even a crash; freed space in it is reused by
tensors of the same size.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Shelf", "Shelved"]


@dataclass(frozen=True, kw_only=True)
class Shelved:
    """A tensor on disk."""

    shape: torch.Size
    dtype: torch.dtype
    at: int
    nbytes: int


class Shelf:
    """Stores tensors, which must not be changed while they are stored.

    Args:
        held_bytes: bytes that may stay in memory; later tensors are spilled.
    """

    def __init__(self, held_bytes: int) -> None:
        self.held_bytes, self._used = held_bytes, 0
        self._file: int | None = None
        self._end = 0
        self._free: dict[int, list[int]] = {}

    def put(self, tensor: Tensor) -> Tensor | Shelved:
        """A handle for ``read``: the tensor itself if it fits or is not on the CPU."""
        if tensor.device.type != "cpu" or self._used + tensor.nbytes <= self.held_bytes:
            self._used += tensor.nbytes
            return tensor
        return self._write(tensor)

    def read(self, handle: Tensor | Shelved) -> Tensor:
        """The tensor of a handle."""
        if isinstance(handle, Tensor):
            return handle
        assert self._file is not None
        tensor = torch.empty(handle.shape, dtype=handle.dtype)
        view, done = _bytes_of(tensor), 0
        while done < handle.nbytes:
            count = os.preadv(self._file, [view[done:]], handle.at + done)
            if count == 0:
                raise OSError("a temporary file of this round ends early.")
            done += count
        return tensor

    def forget(self, handle: Tensor | Shelved) -> None:
        """Free the memory or the file space of a handle."""
        if isinstance(handle, Tensor):
            self._used -= handle.nbytes
        else:
            self._free.setdefault(handle.nbytes, []).append(handle.at)

    def _write(self, tensor: Tensor) -> Shelved:
        if self._file is None:
            self._file, path = tempfile.mkstemp(prefix="flexlora-sums-")
            os.unlink(path)
            weakref.finalize(self, os.close, self._file)
        places = self._free.get(tensor.nbytes)
        at = places.pop() if places else self._end
        self._end = max(self._end, at + tensor.nbytes)
        view, done = _bytes_of(tensor.contiguous()), 0
        while done < tensor.nbytes:
            done += os.pwrite(self._file, view[done:], at + done)
        return Shelved(shape=tensor.shape, dtype=tensor.dtype, at=at, nbytes=tensor.nbytes)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
