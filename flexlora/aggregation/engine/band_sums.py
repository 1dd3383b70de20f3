"""Weighted means of products by band of rank, each over the clients that reach the band.

M = sum_j sum_{k: r_k > j} (w_k / W_j) s_k B_k[:, j] A_k[j],    W_j = sum_{k: r_k > j} w_k
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from flexlora.aggregation.engine.product_sums import ProductSums
from flexlora.aggregation.engine.starts import Start
from flexlora.algebra.decompose import MatrixSum
from flexlora.lora.adapters import LoRAFactors

__all__ = ["BandSums"]


class BandSums:
    """One weighted sum per module and band; the ranks of the classes are the ends of bands."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], sent: Mapping[str, Start]) -> None:
        self.shapes = dict(shapes)
        self._ends = {
            name: sorted({start.trained[name].rank for start in sent.values()}) for name in shapes
        }
        self._sums: dict[tuple[str, int], ProductSums] = {}

    def add(
        self,
        factors: Mapping[str, LoRAFactors],
        weight: float,
        minus: Mapping[str, LoRAFactors] | None = None,
    ) -> None:
        """Add one client's products minus those of ``minus``, band by band."""
        for name, module in factors.items():
            for first, band in self._split(name, module):
                self._sum(name, first).add({name: band}, weight)
        for name, module in (minus or {}).items():
            for first, band in self._split(name, module):
                self._sum(name, first).subtract({name: band}, weight)

    def _split(self, name: str, factors: LoRAFactors) -> list[tuple[int, LoRAFactors]]:
        ends: Sequence[int] = self._ends[name] or range(1, factors.rank + 1)
        cuts = [0, *(end for end in ends if end < factors.rank), factors.rank]
        return [(first, factors.terms(range(first, last))) for first, last in pairwise(cuts)]

    def _sum(self, name: str, first: int) -> ProductSums:
        key = (name, first)
        if key not in self._sums:
            self._sums[key] = ProductSums({name: self.shapes[name]})
        return self._sums[key]

    def mean(self, name: str) -> MatrixSum:
        """The sum of a module's bands, each divided by the weight of the clients that reach it."""
        total = MatrixSum(shape=self.shapes[name])
        for key in sorted(key for key in self._sums if key[0] == name):
            total = total + self._sums[key].mean(name)
        return total

    def clear(self) -> None:
        self._sums = {}
