"""The server's learning rate from the updates of its round: FedExP (ICLR 2023, arXiv 2301.09604).

    eta = max(1, sum_k p_k |D_k|^2 / (2 |sum_k p_k D_k|^2)),    |D|^2 summed over all modules

``D_k`` is the change that client k's training made. Where clients agree, the mean is as long as
each of them and eta is 1; where their changes are orthogonal, the mean of K is sqrt(K) times
shorter and eta is K / 2. The paper has no bound but a constant that keeps the denominator from
zero. Here eta is at most 2, which does the same for changes that cancel out and for a round without
training, and is the better rate in large cohorts (``docs/log.md``).
"""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.aggregation.engine.product_sums import factors_term
from flexlora.algebra.decompose import MatrixSum
from flexlora.lora.adapters import Adapter

__all__ = ["LARGEST_RATE", "ChangeNorms", "change_energy"]

LARGEST_RATE = 2.0


class ChangeNorms:
    """``sum_k w_k |D_k|^2`` and ``sum_k w_k`` over the updates of a round."""

    def __init__(self) -> None:
        self._energy = self._total = 0.0

    def add(self, energy: float, weight: float) -> None:
        """Add one change by its squared norm (``change_energy``), or many by their mean one."""
        self._energy += weight * energy
        self._total += weight

    def rate(self, mean: Mapping[str, MatrixSum]) -> float:
        """Eta of the round whose mean change is ``mean``; costs O((m + n) R^2) a module.

        ``mean`` of zero (no training, or changes that cancel) gives ``LARGEST_RATE``.
        """
        energy = self._energy / self._total
        of_mean = sum(matrix.energy() for matrix in mean.values())
        if energy >= 2.0 * LARGEST_RATE * of_mean:
            return LARGEST_RATE
        return max(1.0, energy / (2.0 * of_mean))


def change_energy(adapter: Adapter, start: Adapter | None = None) -> float:
    """``|s B A - start|^2`` over all modules, in float64; costs O((m + n) r^2) a module."""
    return sum(_change(adapter, start, name).energy() for name in adapter)


def _change(adapter: Adapter, start: Adapter | None, name: str) -> MatrixSum:
    factors = adapter[name]
    minus = () if start is None else (factors_term(-1.0, start[name]),)
    return MatrixSum(
        shape=(factors.out_features, factors.in_features),
        terms=(factors_term(1.0, factors), *minus),
    )
