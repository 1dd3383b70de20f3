"""Updates that wait for their turn in a round, spilled to safetensors files beyond a limit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flexlora.aggregation.engine.updates import Update
from flexlora.lora.adapters import Adapter, LoRAFactors

__all__ = ["WAITING_BYTES", "StoredAdapter", "WaitingUpdates"]

WAITING_BYTES = 1 << 27


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """Factors that are read one module at a time; with a ``path`` they are meta tensors here."""

    adapter: Adapter
    path: Path | None = None

    def read(self, name: str) -> LoRAFactors:
        """The factors of one module."""
        factors = self.adapter[name]
        if self.path is None:
            return factors
        with safe_open(self.path, framework="pt") as file:
            labels = ("lora_A", "lora_B")
            tensors = {label: file.get_tensor(f"{name}.{label}").clone() for label in labels}
        return replace(factors, **tensors)


class WaitingUpdates:
    """Updates by key: in memory up to ``limit_bytes``, the rest in a temporary folder."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.held_bytes = limit_bytes, 0
        self._updates: dict[str, Update] = {}
        self._on_disk: dict[str, Path] = {}
        self._folder: tempfile.TemporaryDirectory | None = None
        self._written = 0

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._updates

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._updates))

    def put(self, update: Update) -> None:
        size = update.adapter.num_bytes
        if self.held_bytes + size > self.limit_bytes:
            update = self._write(update)
        else:
            self.held_bytes += size
        self._updates[update.key] = update

    def get(self, client_id: str) -> Update:
        """An update that goes on waiting; its tensors may be on disk (``stored``)."""
        return self._updates[client_id]

    def stored(self, client_id: str) -> StoredAdapter:
        """The factors of an update that goes on waiting."""
        adapter = self._updates[client_id].adapter
        return StoredAdapter(adapter=adapter, path=self._on_disk.get(client_id))

    def take(self, client_id: str) -> Update:
        update = self._updates.pop(client_id)
        path = self._on_disk.pop(client_id, None)
        if path is None:
            self.held_bytes -= update.adapter.num_bytes
            return update
        # Clone: tensors of a mapped file have any alignment, which decides how kernels round.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        path.unlink()
        modules = {
            name: replace(
                factors, lora_A=tensors[f"{name}.lora_A"], lora_B=tensors[f"{name}.lora_B"]
            )
            for name, factors in update.adapter.items()
        }
        return replace(update, adapter=Adapter(modules))

    def close(self) -> None:
        """Remove the temporary folder."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _write(self, update: Update) -> Update:
        """Write the tensors to disk; the result has meta tensors in their place."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="flexlora-round-")
        path = Path(self._folder.name) / f"{self._written}.safetensors"
        self._written += 1
        save_file(update.adapter.tensors(), path)
        self._on_disk[update.key] = path
        return replace(update, adapter=update.adapter.to("meta"))
