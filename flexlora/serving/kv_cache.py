"""Keys and values of running requests: one slot per request, in pools of equal capacity.

A slot has room for all tokens that its request may have, rounded up to a power of two, so that less
than half of the memory in use is reserved in vain and short requests never attend over the length
of the longest. The slots of a pool are neighbours without gaps: one that is freed gets the last
one's contents. Requests join and leave without another's keys being computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KVCache", "LayerShape", "Pool", "Slot"]

SMALLEST = 64  # tokens of the smallest slot


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Heads and widths of one layer's keys and values, per token."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize


@dataclass(eq=False)
class Slot:
    """A request's place: row ``index`` of ``pool`` with ``length`` tokens in it."""

    pool: Pool
    index: int
    length: int = 0

    def clear(self) -> None:
        """Zeros for the tokens in it."""
        first = self.index * self.pool.capacity
        for held in (self.pool.keys, self.pool.values):
            for matrix in held.values():
                matrix[first : first + self.pool.capacity].zero_()


class Pool:
    """Slots of ``capacity`` tokens: of each layer ``keys [slots * capacity, heads, width]``."""

    def __init__(self, layers: dict[int, LayerShape], capacity: int, device: torch.device) -> None:
        self.layers, self.capacity, self.device = layers, capacity, device
        self.slots: list[Slot] = []
        self.reserved = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    @property
    def slot_bytes(self) -> int:
        return self.capacity * sum(layer.token_bytes for layer in self.layers.values())

    def resize(self, slots: int) -> None:
        """Memory for ``slots`` slots, with the contents of those in use."""
        used = len(self.slots) * self.capacity
        for index, shape in self.layers.items():
            for held, width in ((self.keys, shape.key_width), (self.values, shape.value_width)):
                rows = (slots * self.capacity, shape.heads, width)
                new = torch.zeros(rows, dtype=shape.dtype, device=self.device)
                if used:
                    new[:used] = held[index][:used]
                held[index] = new
        self.reserved = slots

    def take(self) -> Slot:
        slot = Slot(self, len(self.slots))
        self.slots.append(slot)
        return slot

    def free(self, slot: Slot) -> None:
        """Move the last slot's tokens into the place of ``slot``."""
        last = self.slots.pop()
        if last is slot:
            return
        target, source = slot.index * self.capacity, last.index * self.capacity
        for held in (self.keys, self.values):
            for matrix in held.values():
                matrix[target : target + last.length] = matrix[source : source + last.length]
        last.index = slot.index
        self.slots[last.index] = last


class KVCache:
    """Pools of 64, 128, 256, ... tokens up to ``max_length``, together up to ``max_bytes``."""

    def __init__(
        self,
        layers: dict[int, LayerShape],
        *,
        max_length: int,
        max_bytes: int,
        device: torch.device,
    ) -> None:
        self.layers, self.max_bytes = layers, max_bytes
        capacities = [SMALLEST]
        while capacities[-1] < max_length:
            capacities.append(2 * capacities[-1])
        capacities[-1] = max_length
        self.pools = [Pool(layers, capacity, device) for capacity in capacities]

    @property
    def reserved_bytes(self) -> int:
        return sum(pool.reserved * pool.slot_bytes for pool in self.pools)

    @property
    def used_bytes(self) -> int:
        return sum(len(pool.slots) * pool.slot_bytes for pool in self.pools)

    def fits_alone(self, tokens: int) -> bool:
        """Whether a request of ``tokens`` fits into an empty cache."""
        return self._pool(tokens).slot_bytes <= self.max_bytes

    def take(self, tokens: int) -> Slot | None:
        """A slot with room for ``tokens``; None where the memory is in use by others."""
        pool = self._pool(tokens)
        if len(pool.slots) < pool.reserved or self._reserve(pool):
            return pool.take()
        return None

    def free(self, slot: Slot) -> None:
        """Give a slot back; memory of a pool that is empty by now is returned."""
        slot.pool.free(slot)
        if not slot.pool.slots:
            slot.pool.resize(0)

    def _pool(self, tokens: int) -> Pool:
        return next(pool for pool in self.pools if pool.capacity >= tokens)

    def _reserve(self, pool: Pool) -> bool:
        """Make room in ``pool``, twice what it has where possible, at others' reserve's cost."""
        if self.used_bytes + pool.slot_bytes > self.max_bytes:
            return False
        if self.reserved_bytes + pool.slot_bytes > self.max_bytes:
            for other in self.pools:
                if other is not pool and other.reserved > len(other.slots):
                    other.resize(len(other.slots))
        more = (self.max_bytes - self.reserved_bytes) // pool.slot_bytes
        pool.resize(pool.reserved + min(more, max(1, pool.reserved)))
        return True
