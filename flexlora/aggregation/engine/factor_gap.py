"""The gap between averaging factors and averaging products, per module (arXiv 2409.05976, eq. 3).

``mean(s B) mean(A)`` is not ``mean(s B A)``: their difference is the covariance of the two factors
over the clients. It is estimated from 32 random probes, ``|(P - M) X| / |M X|`` with entries of
plus or minus 1, so that it costs a few thin products whatever the number of clients.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flexlora.aggregation.engine.factor_sums import FactorSums
from flexlora.aggregation.engine.method import Start, Update
from flexlora.aggregation.engine.product_sums import ProductSums
from flexlora.seeds import generator

__all__ = ["FactorGap", "rows_of"]

PROBES = 32


def rows_of(update: Update, sent: Mapping[str, Start]) -> dict[str, list[int]] | None:
    """Which terms of what was sent each module's own are; None where they are the first."""
    start = sent.get(update.rank_class)
    if start is None or not start.local.select:
        return None
    return {name: start.drawn_terms(update.client_id, name) for name in update.adapter}


class FactorGap:
    """Takes the updates of a round beside the method's own sums; shares its products if it can."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], products: ProductSums | None) -> None:
        self._shared = products is not None
        self._products = products or ProductSums(shapes)
        self._factors = FactorSums(shapes)

    def add(self, update: Update, rows: Mapping[str, list[int]] | None) -> None:
        self._factors.add(update.adapter, update.num_examples, rows)
        if not self._shared:
            self._products.add(update.adapter, update.num_examples)

    def report(self) -> dict[str, dict[str, float]]:
        """``factor_gap`` by module, relative to the mean product; and the sizes behind it."""
        reports = {}
        for name, (_, in_features) in self._products.shapes.items():
            draws = torch.rand(in_features, PROBES, generator=generator(0, "probes", name))
            probes = torch.where(draws < 0.5, -1.0, 1.0).double()
            mean = self._products.apply(name, probes)
            A, B = self._factors.mean(name)
            gap, size = float((B @ (A @ probes) - mean).norm()), float(mean.norm())
            reports[name] = {"factor_gap": gap / size if size > 0 else 0.0}
        return reports
