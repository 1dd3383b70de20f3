"""Adapters by name: added, replaced and removed while requests use them.

A name points to the newest version. A request pins the version that it began with until it ends,
so that replacing or removing a name changes no answer that is under way; a version that no name
and no request refers to is dropped.
"""

from __future__ import annotations

import threading
from pathlib import Path

from flexlora.lora.adapters import Adapter
from flexlora.training.base_model import BaseModel

__all__ = ["AdapterStore"]


class AdapterStore:
    """Adapters of one base, in host memory; those in use, up to ``device_bytes``, on the device.

    All methods may be called from any thread.
    """

    def __init__(self, base: BaseModel, *, device_bytes: int = 2**30) -> None:
        self.base, self.device_bytes = base, device_bytes
        self._lock = threading.RLock()

    def add(self, name: str, source: str | Path | Adapter, *, replace: bool = False) -> None:
        """Read and check the PEFT folder ``source``, or take an adapter, under ``name``.

        Raises:
            UserError: the name is in use (unless ``replace``) or is no name, the folder cannot be
                read, the adapter is for another base, or is larger than ``device_bytes``.
        """
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Forget ``name``; requests that use it go on to their end.

        Raises:
            UserError: there is no such name.
        """
        raise NotImplementedError

    def names(self) -> list[str]:
        """All names, sorted."""
        raise NotImplementedError
