"""Weighted sums of products, ``sum_k w_k s_k B_k A_k`` per module, held as what is smaller.

Up to a certain sum of ranks the factors themselves are kept; beyond it they are multiplied into one
dense matrix per module, so that the memory of a round does not grow with the number of its clients.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexlora.adapters import LoRAFactors
from flexlora.decompose import MatrixSum, Term, dense_pays, fold
from flexlora.linalg import FactoredSVD

__all__ = ["ProductSums", "factors_term", "svd_term"]

FOLD_RANK = 512  # ranks multiplied out together: enough for a matrix product at full rate


class ProductSums:
    """``sum_k num_examples_k * s_k B_k A_k`` for every module of ``shapes``."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.shapes = dict(shapes)
        self.total = 0.0
        self._terms: dict[str, list[Term]] = {name: [] for name in shapes}
        self._ranks = dict.fromkeys(shapes, 0)
        self._dense: dict[str, Tensor] = {}

    def add(self, factors: Mapping[str, LoRAFactors], weight: float) -> None:
        """Add ``weight`` times the products; the same weight counts in ``total``."""
        self.total += weight
        self._append(factors, weight)

    def subtract(self, factors: Mapping[str, LoRAFactors], weight: float) -> None:
        """Take ``weight`` times the products away; ``total`` stays."""
        self._append(factors, -weight)

    def _append(self, factors: Mapping[str, LoRAFactors], weight: float) -> None:
        for name, own in factors.items():
            self._terms[name].append((weight * own.scaling, own.lora_B, own.lora_A))
            self._ranks[name] += own.rank
            self._fold(name)

    def _fold(self, name: str) -> None:
        waiting = sum(left.shape[1] for _, left, _ in self._terms[name])
        dense = name in self._dense
        if not dense and not dense_pays(self.shapes[name], self._ranks[name]):
            return
        if not dense or waiting >= FOLD_RANK:
            terms, self._terms[name] = self._terms[name], []
            self._dense[name] = fold(self._dense.get(name), terms, self.shapes[name])

    def apply(self, name: str, probes: Tensor) -> Tensor:
        """``M @ probes`` of the weighted mean ``M``, ``[in, k] -> [out, k]``, in float64."""
        total = probes.new_zeros(self.shapes[name][0], probes.shape[1], dtype=torch.float64)
        if name in self._dense:
            dense = self._dense[name]
            total += (dense @ probes.to(dense.dtype)).double()
        for weight, left, right in self._terms[name]:
            total += weight * (left.double() @ (right.double() @ probes))
        return total / self.total

    def take(self, name: str, weight: float = 1.0) -> MatrixSum:
        """``weight`` times the weighted mean; it is handed over and forgotten here."""
        share = weight / self.total if self.total else 0.0
        terms = tuple((share * w, left, right) for w, left, right in self._terms.pop(name))
        dense = self._dense.pop(name, None)
        if dense is not None:
            dense.mul_(share)
        return MatrixSum(shape=self.shapes[name], terms=terms, dense=dense)


def factors_term(weight: float, factors: LoRAFactors) -> Term:
    """``weight * s B A`` as one term."""
    return weight * factors.scaling, factors.lora_B, factors.lora_A


def svd_term(weight: float, svd: FactoredSVD) -> Term:
    """``weight * U diag(S) Vh`` as one term."""
    return weight, svd.U.double() * svd.S.double(), svd.Vh
