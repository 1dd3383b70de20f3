"""The gap between averaging factors and averaging products, per module (arXiv 2409.05976, eq. 3).

``mean(s B) mean(A)`` is not ``mean(s B A)``: their difference is the covariance of the two factors
over the clients. It is estimated from 32 random probes, ``|(P - M) X| / |M X|`` with entries of
plus or minus 1, at the cost of a second pair of sums and a few thin products.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flexlora.aggregation.engine.starts import Start
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.aggregation.engine.updates import Update
from flexlora.seeds import generator

__all__ = ["FactorGap"]

PROBES = 32


class FactorGap:
    """Sums of a round weighted by examples, apart from the sums that the method uses."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        sent: Mapping[str, Start],
        device: torch.device | str = "cpu",
    ) -> None:
        self._sums = Sums(Needs(products=True, factors=True), shapes, sent, device)

    def add(self, update: Update, weight: float | None = None) -> None:
        self._sums.add(update, weight)

    def report(self) -> dict[str, dict[str, float]]:
        """``factor_gap`` by module, relative to the mean product."""
        reports = {}
        for name, product in self._sums.products.items():
            in_features = product.shape[1]
            draws = torch.rand(in_features, PROBES, generator=generator(0, "probes", name))
            A, B = self._sums.factors.mean(name)
            probes = torch.where(draws < 0.5, -1.0, 1.0).to(A)
            mean = product.apply(probes)
            gap, size = float((B @ (A @ probes) - mean).norm()), float(mean.norm())
            reports[name] = {"factor_gap": gap / size if size > 0 else 0.0}
        self._sums.clear()
        return reports
