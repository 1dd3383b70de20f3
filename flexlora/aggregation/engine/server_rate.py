"""The server's learning rate from the updates of its round: FedExP (ICLR 2023, arXiv 2301.09604).

    eta = max(1, sum_k p_k |D_k|^2 / (2 |sum_k p_k D_k|^2)),    |D|^2 summed over all modules

``D_k`` is the change that client k's training made. Where clients agree, the mean is as long as
each of them and eta is 1; where their changes are orthogonal, the mean of K is sqrt(K) times
shorter and eta is K / 2. The paper keeps the denominator from zero with a constant; here eta is at
most ``1 / (2 sum_k p_k^2)``, its value for orthogonal changes, so that changes that cancel out, or
the rounding errors of a round without training, are not blown up.
"""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.aggregation.engine.product_sums import factors_term
from flexlora.algebra.decompose import MatrixSum
from flexlora.lora.adapters import Adapter

__all__ = ["ChangeNorms"]


class ChangeNorms:
    """``sum_k w_k |D_k|^2``, ``sum_k w_k`` and ``sum_k w_k^2`` over the updates of a round."""

    def __init__(self) -> None:
        self._energy = self._total = self._squares = 0.0

    def add(self, adapter: Adapter, weight: float, minus: Adapter | None = None) -> None:
        """Add the change ``adapter - minus``; costs O((m + n) r^2) a module."""
        self._energy += weight * sum(_change(adapter, minus, name).energy() for name in adapter)
        self._total += weight
        self._squares += weight * weight

    def rate(self, mean: Mapping[str, MatrixSum]) -> float:
        """FedExP's eta for the round whose mean change is ``mean``; 1.0 where nothing changed."""
        energy = sum(matrix.energy() for matrix in mean.values())
        mean_energy = self._energy / self._total
        orthogonal = self._total**2 / (2.0 * self._squares)
        if mean_energy >= 2.0 * orthogonal * energy:
            return max(1.0, orthogonal)
        return max(1.0, mean_energy / (2.0 * energy))


def _change(adapter: Adapter, minus: Adapter | None, name: str) -> MatrixSum:
    factors = adapter[name]
    start = () if minus is None else (factors_term(-1.0, minus[name]),)
    return MatrixSum(
        shape=(factors.out_features, factors.in_features),
        terms=(factors_term(1.0, factors), *start),
    )
