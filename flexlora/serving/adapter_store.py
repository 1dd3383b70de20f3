"""Adapters by name: added, replaced and removed while requests use them.

A name points to its newest version. A request keeps the version that it was submitted with, so
that replacing or removing a name changes no answer that is under way. Factors of all named
adapters are in host memory; those on the device are bounded, and the least recently used that no
request has pinned makes room for the next (S-LoRA, arXiv 2311.03285, section 4).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

from flexlora.errors import UserError, nearest
from flexlora.lora.adapters import Adapter
from flexlora.lora.peft_folder import load_adapter
from flexlora.runs.sources import Sources, read_origin
from flexlora.serving.rank_arena import RankArena, Rows, prepared, row_bytes
from flexlora.training.base_model import BaseModel
from flexlora.training.targets import choose_targets, linear_shapes, shape_misfit

__all__ = ["AdapterStore", "Version"]

MAX_NAME = 200


@dataclass(eq=False)
class Version:
    """One adapter as it was when it was added under ``name``; ``pins`` are the running requests."""

    name: str
    adapter: Adapter
    pins: int = 0

    @property
    def rank(self) -> int:
        """Rows that it takes on the device: the largest rank of its modules."""
        return max(factors.rank for factors in self.adapter.values())


class AdapterStore:
    """Adapters of one base, in host memory; those in use, up to ``device_bytes``, on the device.

    ``add``, ``remove``, ``names`` and ``newest`` may be called from any thread; the rest only from
    the one that runs the engine's steps.
    """

    def __init__(self, base: BaseModel, *, device_bytes: int = 2**30) -> None:
        self.base, self.device_bytes = base, device_bytes
        self.targets = choose_targets(base.model, "all-linear")
        self._shapes = linear_shapes(base.model)
        model_dtype = getattr(base.model, "dtype", torch.float32)
        self.dtype = torch.promote_types(model_dtype, torch.float32)
        self.row_bytes = row_bytes(self.targets.shapes, self.dtype)
        self.arena = RankArena(
            self.targets.shapes,
            max_rows=device_bytes // self.row_bytes,
            dtype=self.dtype,
            device=base.device,
        )
        self.loads = self.evictions = 0
        self._lock = threading.RLock()
        self._named: dict[str, Version] = {}
        self._resident: OrderedDict[Version, None] = OrderedDict()  # least recently used first

    def add(self, name: str, source: str | Path | Adapter, *, replace: bool = False) -> None:
        """Read and check the PEFT folder ``source``, or take an adapter, under ``name``.

        Raises:
            UserError: the name is in use (unless ``replace``) or is no name, the folder cannot be
                read, the adapter is for another base, or is larger than ``device_bytes``.
        """
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise UserError(f"adapter name {name[:40]!r}: expected 1 to {MAX_NAME} characters.")
        if not replace:
            self._check_new(name)
        adapter = source if isinstance(source, Adapter) else self._read(name, Path(source))
        self._check_fits(name, adapter)
        version = Version(name, prepared(adapter, self.dtype))
        self._check_size(version)
        with self._lock:
            if not replace:
                self._check_new(name)
            self._named[name] = version

    def remove(self, name: str) -> None:
        """Forget ``name``; requests that use it go on to their end.

        Raises:
            UserError: there is no such name.
        """
        with self._lock:
            self._version(name)
            del self._named[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        with self._lock:
            return sorted(self._named)

    def newest(self, name: str) -> Version:
        """The version that ``name`` points to now.

        Raises:
            UserError: there is no such name.
        """
        with self._lock:
            return self._version(name)

    def load(self, version: Version) -> bool:
        """Pin a version on the device; False where pinned ones take all of its memory."""
        if version in self._resident:
            self._resident.move_to_end(version)
        else:
            self._drop_unnamed()
            if not self._make_room(version.rank):
                return False
            self.arena.place(version, version.adapter)
            self._resident[version] = None
            self.loads += 1
        version.pins += 1
        return True

    def release(self, version: Version) -> None:
        """Undo one ``load``; a version that no name points to is dropped with its last pin."""
        version.pins -= 1
        self._drop_unnamed()

    def rows(self, version: Version) -> Rows:
        """Where a version is in the arena, until the arena's next change."""
        return self.arena[version]

    @property
    def resident(self) -> int:
        """Versions on the device."""
        return len(self._resident)

    @property
    def resident_bytes(self) -> int:
        return self.arena.used_rows * self.row_bytes

    def _make_room(self, rank: int) -> bool:
        idle = [version for version in self._resident if not version.pins]
        free = self.arena.max_rows - self.arena.used_rows
        if free + sum(version.rank for version in idle) < rank:
            return False
        for version in idle:
            if self.arena.fits(rank):
                break
            self._evict(version)
            self.evictions += 1
        return True

    def _drop_unnamed(self) -> None:
        """Free versions that were replaced or removed and that no request uses any more."""
        with self._lock:
            gone = [
                version
                for version in self._resident
                if not version.pins and self._named.get(version.name) is not version
            ]
        for version in gone:
            self._evict(version)

    def _evict(self, version: Version) -> None:
        self.arena.remove(version)
        del self._resident[version]

    def _version(self, name: str) -> Version:
        if name not in self._named:
            hint = nearest(name, self._named) or f" There are {len(self._named)} adapters."
            raise UserError(f"no adapter is named '{name}'.{hint}")
        return self._named[name]

    def _check_new(self, name: str) -> None:
        with self._lock:
            if name in self._named:
                raise UserError(f"two adapters are named '{name}'; give one of them another name.")

    def _read(self, name: str, folder: Path) -> Adapter:
        """The adapter in a folder, after a look at the base that it names.

        Raises:
            UserError: it was trained on another base.
        """
        adapter, origin = load_adapter(folder), read_origin(folder)
        now = Sources(base=self.base.fingerprint)
        if origin is not None and origin.differences(now, self.base.name):
            raise UserError(
                f"adapter '{name}' in '{folder}' was trained on another base than "
                f"'{self.base.name}' (fingerprint {origin.base[:12]}, here {now.base[:12]})."
            )
        return adapter

    def _check_fits(self, name: str, adapter: Adapter) -> None:
        """Refuse modules that the base lacks, that have other shapes, or that cannot be adapted."""
        if cause := shape_misfit(adapter, self._shapes):
            raise UserError(f"adapter '{name}' does not fit '{self.base.name}': {cause}")
        for module, factors in adapter.items():
            largest = factors.scaling * float(factors.lora_B.abs().max())
            if not largest <= torch.finfo(self.dtype).max:
                raise UserError(f"adapter '{name}': '{module}' is not finite once it is scaled.")
            if module not in self.targets.shapes:
                cause = self.targets.left_out.get(module, "it is the output layer")
                raise UserError(
                    f"adapter '{name}': module '{module}' cannot be served, as {cause}."
                )

    def _check_size(self, version: Version) -> None:
        if version.rank > self.arena.max_rows:
            needed = math.ceil(version.rank * self.row_bytes / 2**20)
            raise UserError(
                f"adapter '{version.name}' of rank {version.rank} takes {needed} MiB, and "
                f"{self.device_bytes / 2**20:.4g} MiB are for adapters; allow more."
            )
