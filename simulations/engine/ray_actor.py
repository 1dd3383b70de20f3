"""One process of a Ray pool: holds a worker and trains or evaluates whole cohorts.

Adapters cross between processes as ``Parcel``: raw bytes that Ray leaves in shared memory, a tenth
of the time of torch's own way. A job names its adapters by ``Key``, so that what many jobs start
from crosses once. Ray pickles what goes between its processes: a Ray cluster is one trust domain.

Nothing heavy is imported before ``CohortActor`` has fixed the number of threads: the libraries
below torch read it once, when they are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import flexlora
from flexlora.config.cores import wait_passively
from flexlora.config.resolve import Config

if TYPE_CHECKING:
    import numpy as np
    import torch

    from flexlora.lora.adapters import Adapter

__all__ = ["CohortActor", "Key", "Parcel", "pack", "swapped", "unpack"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Key(str):
    """Replaces an adapter in a job; the digest of the adapter."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """An adapter between processes: its alphas, and every tensor as dtype, shape and bytes."""

    modules: Mapping[str, tuple[float, bool]]
    tensors: tuple[tuple[str, tuple[int, ...], np.ndarray], ...]


def pack(adapter: Adapter) -> Parcel:
    """The adapter as it is, in its own dtypes."""
    import torch

    def raw(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], np.ndarray]:
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.numpy()

    return Parcel(
        modules={name: (factors.alpha, factors.rslora) for name, factors in adapter.items()},
        tensors=tuple(raw(t) for f in adapter.values() for t in (f.lora_A, f.lora_B)),
    )


def unpack(parcel: Parcel) -> Adapter:
    """The adapter in new memory, since Ray's buffers are read-only."""
    import torch

    from flexlora.lora.adapters import Adapter, LoRAFactors

    def tensor(dtype: str, shape: tuple[int, ...], raw: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(raw.copy()).view(getattr(torch, dtype)).view(shape)

    tensors = iter([tensor(*item) for item in parcel.tensors])
    return Adapter(
        {
            name: LoRAFactors(
                lora_A=next(tensors), lora_B=next(tensors), alpha=alpha, rslora=rslora
            )
            for name, (alpha, rslora) in parcel.modules.items()
        }
    )


def swapped(value: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    """``value`` with ``new(x)`` in the place of every x of ``kind`` in its fields and entries."""
    if isinstance(value, kind):
        return new(value)
    if is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in fields(value)}
        changes = {name: swapped(part, kind, new) for name, part in old.items()}
        changes = {name: part for name, part in changes.items() if part is not old[name]}
        return replace(value, **changes) if changes else value
    if isinstance(value, dict):
        return {name: swapped(part, kind, new) for name, part in value.items()}
    return value


class CohortActor:
    """Runs in a process of its own; Ray calls it, one call at a time."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.config = Config.of(values)
        threads = str(self.config.engine.threads)
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, threads))
        wait_passively()
        self.adapters: dict[str, Adapter] = {}

    def process_id(self) -> int:
        """Answers once Ray has started this process, and while it lives."""
        return os.getpid()

    def load(self) -> tuple[str, str, tuple[str, ...]]:
        """Load base and data; FlexLoRA's version, the base's fingerprint and the client ids.

        Raises:
            UserError: what the worker of the main process would refuse, or what is missing here.
        """
        from flexlora.clients.worker import worker_for

        self.worker = worker_for(self.config)
        found = self.worker.base.fingerprint, tuple(self.worker.client_ids)
        return flexlora.__version__, *found

    def train(self, jobs: Sequence[Any], keys: Sequence[str], *parcels: Parcel) -> list[Any]:
        return self._answer(self.worker.train, jobs, keys, parcels)

    def evaluate(self, jobs: Sequence[Any], keys: Sequence[str], *parcels: Parcel) -> list[Any]:
        return self._answer(self.worker.evaluate, jobs, keys, parcels)

    def _answer(
        self,
        work: Callable[[Sequence[Any]], list[Any]],
        jobs: Sequence[Any],
        keys: Sequence[str],
        parcels: Sequence[Parcel],
    ) -> list[Any]:
        """The results of one cohort; adapters that the last one had too are not unpacked again."""
        from flexlora.lora.adapters import Adapter

        last, self.adapters = self.adapters, {}
        for key, parcel in zip(keys, parcels, strict=True):
            self.adapters[key] = last[key] if key in last else unpack(parcel)
        whole = [swapped(job, Key, self.adapters.__getitem__) for job in jobs]
        return [swapped(result, Adapter, pack) for result in work(whole)]
