"""All adapters on the device as rows of one matrix per module, each as many rows as its rank.

Of a module with factors ``A_k [rank_k, in]`` and ``B_k [out, rank_k]`` the arena holds

    A [rows, in] = [A_1; A_2; ...]      B [rows, out] = [s_1 B_1^T; s_2 B_2^T; ...]

so that adapters of neighbouring rows can share one product (``block_plan.py``), and none is padded
to the rank of another. The rows of an adapter are the same in all modules: its largest rank, where
the modules' ranks differ. S-LoRA (arXiv 2311.03285, section 5) has pages of one rank each; here an
adapter is contiguous, and adapters are moved together where the free rows are scattered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.lora.adapters import Adapter, LoRAFactors

__all__ = ["RankArena", "Rows", "prepared", "row_bytes"]

FIRST_ROWS = 64


@dataclass(frozen=True, order=True)
class Rows:
    """Rows ``start`` to ``stop`` of every module's matrices."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class RankArena:
    """Matrices of ``shapes`` ``{module: (out_features, in_features)}``, up to ``max_rows`` rows.

    Memory doubles with the rows in use. A key is placed once, until it is removed. Not thread-safe.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shapes, self.max_rows = dict(shapes), max_rows
        empty = torch.empty(0, dtype=dtype, device=device)
        self.A = {name: empty.new_zeros(0, width) for name, (_, width) in shapes.items()}
        self.B = {name: empty.new_zeros(0, height) for name, (height, _) in shapes.items()}
        self.capacity = 0
        self.moves = 0  # how often rows of a key may have changed: plans made before are void
        self.users = dict.fromkeys(shapes, 0)  # adapters that have each module
        self.used_rows = 0
        self._rows: dict[object, Rows] = {}
        self._modules: dict[object, tuple[str, ...]] = {}

    def __getitem__(self, key: object) -> Rows:
        return self._rows[key]

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def fits(self, rank: int) -> bool:
        """Whether ``rank`` more rows are free, perhaps after moving others."""
        return self.used_rows + rank <= self.max_rows

    def place(self, key: object, adapter: Adapter) -> None:
        """Copy an adapter's factors into free rows.

        Raises:
            ValueError: it does not fit.
        """
        rank = max(factors.rank for factors in adapter.values())
        if not self.fits(rank):
            raise ValueError(f"{rank} rows do not fit: {self.used_rows} of {self.max_rows} in use.")
        rows = self._free(rank)
        if rows is None:
            self._pack()
            rows = self._free(rank)
        assert rows is not None
        if rows.stop > self.capacity:
            self._grow(rows.stop)
        self._rows[key], self._modules[key] = rows, tuple(adapter)
        self.used_rows += rank
        for name in adapter:
            self.users[name] += 1
        for name in self.shapes:
            self._write(name, rows, adapter.get(name))

    def remove(self, key: object) -> None:
        """Free a key's rows."""
        self.used_rows -= len(self._rows.pop(key))
        for name in self._modules.pop(key):
            self.users[name] -= 1

    def _write(self, name: str, rows: Rows, factors: LoRAFactors | None) -> None:
        """The rows of one module: its factors, then zeros."""
        A, B = self.A[name][rows.start : rows.stop], self.B[name][rows.start : rows.stop]
        rank = 0
        if factors is not None:
            rank = factors.rank
            A[:rank].copy_(factors.lora_A)
            B[:rank].copy_(_scaled(factors).T)
        A[rank:].zero_()
        B[rank:].zero_()

    def _free(self, rank: int) -> Rows | None:
        """The first gap of ``rank`` rows, or rows after the last; None where both are missing."""
        at = 0
        for rows in sorted(self._rows.values()):
            if rows.start - at >= rank:
                break
            at = rows.stop
        return Rows(at, at + rank) if at + rank <= self.max_rows else None

    def _pack(self) -> None:
        """Move all adapters to the front, in their order, without gaps."""
        at, packed = 0, {}
        for key, rows in sorted(self._rows.items(), key=lambda item: item[1]):
            if rows.start != at:
                for matrix in (*self.A.values(), *self.B.values()):
                    matrix[at : at + len(rows)] = matrix[rows.start : rows.stop].clone()
            packed[key] = Rows(at, at + len(rows))
            at += len(rows)
        self._rows, self.moves = packed, self.moves + 1

    def _grow(self, needed: int) -> None:
        """At least ``needed`` rows, one matrix after the other: the peak is one module's copy."""
        rows = min(max(needed, 2 * self.capacity, FIRST_ROWS), self.max_rows)
        for matrices in (self.A, self.B):
            for name, old in matrices.items():
                matrices[name] = old.new_empty(rows, old.shape[1])
                matrices[name][: self.capacity] = old
        self.capacity = rows


def row_bytes(shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> int:
    """Bytes of one row in all modules: an adapter takes this times its largest rank."""
    return sum(out + width for out, width in shapes.values()) * dtype.itemsize


def prepared(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """``adapter`` as the arena holds it: scaling 1, ``lora_B`` column by column, no zero terms.

    Zero terms are such as the padding of the portable layout. To place it is to copy it.
    """
    modules = {}
    for name, factors in adapter.items():
        live = _nonzero(factors.lora_A, dim=1) & _nonzero(factors.lora_B, dim=0)
        index = live.nonzero().flatten()
        index = index if len(index) else torch.zeros(1, dtype=torch.long)  # a rank is at least 1
        kept = factors.terms(index.tolist())
        modules[name] = LoRAFactors(
            lora_A=kept.lora_A.to(dtype),
            lora_B=_scaled(kept).to(dtype).T.contiguous().T,
            alpha=float(kept.rank),
        )
    return Adapter(modules)


def _scaled(factors: LoRAFactors) -> Tensor:
    """``scaling * lora_B``, multiplied in float64."""
    return factors.lora_B if factors.scaling == 1.0 else factors.scaling * factors.lora_B.double()


def _nonzero(matrix: Tensor, *, dim: int) -> Tensor:
    return (matrix != 0).any(dim=dim)
