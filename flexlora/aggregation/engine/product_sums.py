"""Weighted sums of products ``sum_k w_k s_k B_k A_k``: as factors or dense, whichever is smaller.

Up to a certain sum of ranks a module's factors are stored; beyond it they are multiplied into one
dense matrix. Beyond ``HELD_BYTES`` both are spilled to disk (``spill.py``) and read back one module
at a time, so the memory of a round does not grow with the number of its clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from flexlora.aggregation.engine.spill import Shelf, Shelved
from flexlora.algebra.decompose import MatrixSum, Term, dense_pays, fold
from flexlora.algebra.linalg import FactoredSVD
from flexlora.lora.adapters import LoRAFactors

__all__ = ["ProductSums", "factors_term", "svd_term"]

FOLD_RANK = 512  # ranks multiplied out together: enough for a matrix product at full rate
HELD_BYTES = 1 << 27

Stored = Tensor | Shelved


class ProductSums:
    """``sum_k num_examples_k * s_k B_k A_k`` for every module of ``shapes``."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], *, held_bytes: int = HELD_BYTES
    ) -> None:
        self.shapes, self.total = dict(shapes), 0.0
        self._ranks = dict.fromkeys(shapes, 0)
        self._shelf = Shelf(held_bytes)
        self._terms: dict[str, list[tuple[float, Stored, Stored]]] = {name: [] for name in shapes}
        self._dense: dict[str, Stored] = {}

    def add(self, factors: Mapping[str, LoRAFactors], weight: float) -> None:
        """Add ``weight`` times the products; the same weight counts in ``total``."""
        self.total += weight
        self._append(factors, weight)

    def subtract(self, factors: Mapping[str, LoRAFactors], weight: float) -> None:
        """Subtract ``weight`` times the products; ``total`` is unchanged."""
        self._append(factors, -weight)

    def _append(self, factors: Mapping[str, LoRAFactors], weight: float) -> None:
        for name, module in factors.items():
            left, right = self._shelf.put(module.lora_B), self._shelf.put(module.lora_A)
            self._terms[name].append((weight * module.scaling, left, right))
            self._ranks[name] += module.rank
            self._fold(name)

    def _fold(self, name: str) -> None:
        waiting = sum(left.shape[1] for _, left, _ in self._terms[name])
        dense = name in self._dense
        if not dense and not dense_pays(self.shapes[name], self._ranks[name]):
            return
        if not dense or waiting >= FOLD_RANK:
            last = self._dense.pop(name, None)
            total = None if last is None else self._shelf.read(last)
            total = fold(total, self._read(name), self.shapes[name])
            self._forget(name, last)
            self._dense[name] = self._shelf.put(total)

    def _read(self, name: str) -> Iterator[Term]:
        """The terms of a module, read into memory one at a time."""
        for weight, left, right in self._terms[name]:
            yield weight, self._shelf.read(left), self._shelf.read(right)

    def _forget(self, name: str, dense: Stored | None) -> None:
        for _, left, right in self._terms[name]:
            self._shelf.forget(left)
            self._shelf.forget(right)
        self._terms[name] = []
        if dense is not None:
            self._shelf.forget(dense)

    def mean(self, name: str) -> MatrixSum:
        """The weighted mean, computed at each call."""
        share = 1.0 / self.total if self.total else 0.0
        terms = tuple((share * w, left, right) for w, left, right in self._read(name))
        dense = self._dense.get(name)
        scaled = None if dense is None else self._shelf.read(dense) * share
        return MatrixSum(shape=self.shapes[name], terms=terms, dense=scaled)

    def clear(self) -> None:
        """Free the memory and the disk space of all modules."""
        for name in self.shapes:
            self._forget(name, self._dense.pop(name, None))


def factors_term(weight: float, factors: LoRAFactors) -> Term:
    """``weight * s B A`` as one term."""
    return weight * factors.scaling, factors.lora_B, factors.lora_A


def svd_term(weight: float, svd: FactoredSVD) -> Term:
    """``weight * U diag(S) Vh`` as one term."""
    return weight, svd.U.double() * svd.S.double(), svd.Vh
