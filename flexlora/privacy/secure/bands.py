"""Bands of columns, each summed over the clients whose rank reaches it.

    columns 1..r_1 of a module over all clients, r_1+1..r_2 over those of rank r_2 and above, ...

Columns that the same rank classes have make one band over all modules, and its clients are a group:
they mask each other, and a client of low rank pays for no column that it lacks. The first band is
that of all classes, and holds each module's columns up to the lowest rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Band", "bands_of"]

Ranks = Mapping[str, int]  # by module


@dataclass(frozen=True, kw_only=True)
class Band:
    """The columns ``first`` (with) to ``last`` (without) of some modules, and who has them."""

    classes: frozenset[str]
    columns: Mapping[str, tuple[int, int]]

    def dimension(self, rows: Mapping[str, int]) -> int:
        """The numbers of the band, where a module has so many ``rows`` (its out_features)."""
        return sum(rows[name] * (last - first) for name, (first, last) in self.columns.items())

    def vector(self, matrices: Mapping[str, Tensor]) -> Tensor:
        """The band's columns of ``[out, rank]`` matrices, end to end; 0 beyond the rank."""
        parts = (
            _padded(matrices[name], last)[:, first:last]
            for name, (first, last) in self.columns.items()
        )
        return torch.cat([part.reshape(-1) for part in parts])

    def put(self, vector: Tensor, matrices: Mapping[str, Tensor]) -> None:
        """Write a vector back into the band's columns of the matrices."""
        at = 0
        for name, (first, last) in self.columns.items():
            part = matrices[name][:, first:last]
            part.copy_(vector[at : at + part.numel()].view(part.shape))
            at += part.numel()


def _padded(matrix: Tensor, columns: int) -> Tensor:
    missing = max(0, columns - matrix.shape[1])
    return torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix


def bands_of(classes: Mapping[str, Ranks], *, pooled: bool = False) -> list[Band]:
    """The bands of the rank classes by name, of which each has a rank for every module.

    The one of all classes first, then those of fewer and fewer. ``pooled`` makes one band of all
    columns, which every client sends: zeros in those that it lacks.
    """
    if pooled:
        modules = next(iter(classes.values()))
        widest = {module: max(ranks[module] for ranks in classes.values()) for module in modules}
        classes = dict.fromkeys(classes, widest)
    found: dict[frozenset[str], dict[str, tuple[int, int]]] = {}
    for module in sorted(next(iter(classes.values()))):
        first = 0
        for last in sorted({ranks[module] for ranks in classes.values()}):
            names = frozenset(name for name, ranks in classes.items() if ranks[module] >= last)
            found.setdefault(names, {})[module] = (first, last)
            first = last
    ordered = sorted(found, key=lambda names: (-len(names), sorted(names)))
    return [Band(classes=names, columns=found[names]) for names in ordered]
