"""The sums of one round that a method needs, accumulated update by update.

    products        mean over clients of  s_k B_k A_k
    starts          mean over clients of the products that they started from
    linear          mean of  s_k B_k A - s B_start A  over one shared A, as (mean of s B) A
    factors         means of  A_k  and  s_k B_k,  row by row (``factor_sums.py``)
    factor_changes  the same of  A_k - A_start  and  s_k B_k - s B_start
    bands           per band of rank: mean of the products over the clients that reach it
    band_changes    the same of the products less the starts
    norms           mean squared norm of the products, less the starts if those are needed

Client k has weight ``d_k w_k / sum_j d_j w_j``: ``w_k = needs.weight(update)`` is the method's, by
default the examples, and ``d_k`` the discount of a late update, 1 for others. ``Sums.add`` applies
it, so that no method can forget it.

Under differential privacy ``products``, ``starts`` and ``linear`` are not means: see
``gaussian_sum.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from flexlora.aggregation.engine.band_sums import BandSums
from flexlora.aggregation.engine.factor_sums import FactorSums
from flexlora.aggregation.engine.gaussian_sum import GaussianSum
from flexlora.aggregation.engine.linear_update import (
    LinearSums,
    check_basis,
    linear_norm,
    widest_start,
)
from flexlora.aggregation.engine.product_sums import ProductSums, factors_term
from flexlora.aggregation.engine.server_rate import ChangeNorms, change_energy
from flexlora.aggregation.engine.starts import Start
from flexlora.aggregation.engine.updates import Update
from flexlora.algebra.decompose import LazySums, MatrixSum
from flexlora.errors import UpdateRefused
from flexlora.lora.adapters import Adapter

__all__ = ["Needs", "Sums", "drawn_rows"]


def by_examples(update: Update) -> float:
    """FedAvg's weight: the number of examples."""
    return float(update.num_examples)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Which sums the engine accumulates for a method, and the weight of an update in them.

    ``weight`` knows nothing of lateness: the engine multiplies it by the update's discount.
    """

    products: bool = False
    starts: bool = False
    linear: bool = False
    factors: bool = False
    factor_changes: bool = False
    bands: bool = False
    band_changes: bool = False
    norms: bool = False
    weight: Callable[[Update], float] = by_examples

    @property
    def known_start(self) -> bool:
        """Whether an update is refused unless its start is one that this round sent."""
        return self.starts or self.linear or self.factor_changes or self.band_changes


class Sums:
    """Sums over the updates of a round; each property is one of those in ``Needs``.

    ``sent`` maps the name of a rank class to the start that its clients decoded. The sums are made
    on ``device``, that of the state and of ``sent``; updates may be anywhere. With ``private`` each
    update counts by its clipping factor alone, and the noise is drawn in ``dtype``.
    """

    def __init__(
        self,
        needs: Needs,
        shapes: Mapping[str, tuple[int, int]],
        sent: Mapping[str, Start],
        device: torch.device | str = "cpu",
        private: GaussianSum | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._private, self._dtype = private, dtype
        self.needs, self.shapes, self.sent = needs, dict(shapes), sent
        self._device = torch.device(device)
        self._products = ProductSums(shapes)
        self._factors, self._bands = FactorSums(shapes, device), BandSums(shapes, sent)
        # Which ranks came must not show in the width of the noise.
        known = private is not None and needs.linear
        self._linear = LinearSums(widest_start(s.trained for s in sent.values()) if known else None)
        self._start_weights, self._total = dict.fromkeys(sent, 0.0), 0.0
        self._norms = ChangeNorms()
        self.counted, self.unclipped = 0, 0  # the updates of a private sum; those within the clip

    def check(self, update: Update) -> None:
        """Refuse an update whose start is needed and not known.

        Raises:
            UpdateRefused: its start is not one that this round sent, or a linear sum would add it
                with another ``lora_A`` than it was sent.
        """
        start = self.sent.get(update.rank_class)
        if not self.needs.known_start or not self.sent:
            return
        if start is None or start.digest != update.digest:
            raise UpdateRefused(
                f"client {update.client_id}: the update names start "
                f"'{update.rank_class}/{update.digest[:12]}', which this round did not send; "
                "what it started from cannot be subtracted."
            )
        if self.needs.linear:
            check_basis(update.client_id, update.adapter, start.trained)

    def add(self, update: Update, weight: float | None = None) -> None:
        """Accumulate one update in every sum of ``needs``, at the discounted weight.

        ``weight`` takes the place of that, where a robust rule has weighed the updates.
        """
        needs, start = self.needs, self._start_of(update)
        adapter = self._moved(update.adapter)
        weight = self._weight(update, adapter, start) if weight is None else weight
        if needs.products:
            self._products.add(adapter, weight)
        if needs.starts:
            self._total += weight
            if update.rank_class in self._start_weights:
                self._start_weights[update.rank_class] += weight
        if needs.linear:
            self._linear.add(adapter, weight, start)
        if needs.factors:
            self._factors.add(adapter, weight, drawn_rows(update, self.sent))
        if needs.factor_changes:
            self._factors.add(adapter, weight, minus=start)
        if needs.bands or needs.band_changes:
            self._bands.add(adapter, weight, minus=start if needs.band_changes else None)
        if needs.norms:
            self._norms.add(self._energy(update, adapter, start), weight)

    def _weight(self, update: Update, adapter: Adapter, start: Adapter | None) -> float:
        if self._private is not None:
            factor = self._private.factor(self._clipped_energy(update, adapter, start))
            self.counted, self.unclipped = self.counted + 1, self.unclipped + (factor == 1.0)
            return factor
        return update.discount * self.needs.weight(update)

    def _clipped_energy(self, update: Update, adapter: Adapter, start: Adapter | None) -> float:
        """The squared norm of what the private sum adds: of ``L_k`` where that is linear."""
        if self.needs.linear:
            return linear_norm(adapter, start) ** 2
        return self._energy(update, adapter, start)

    def _energy(self, update: Update, adapter: Adapter, start: Adapter | None) -> float:
        """``|D|^2`` of the update's change, by the one route that gives its bits."""
        if update.norms is not None and self.needs.starts:
            return update.norms.change
        return change_energy(adapter, start if self.needs.starts else None)

    def _moved(self, adapter: Adapter) -> Adapter:
        """The adapter where the sums are: itself where it is there."""
        tensors = (tensor for f in adapter.values() for tensor in (f.lora_A, f.lora_B))
        there = all(tensor.device == self._device for tensor in tensors)
        return adapter if there else adapter.to(self._device)

    def _start_of(self, update: Update) -> Adapter | None:
        start = self.sent.get(update.rank_class)
        return start.trained if start is not None else None

    @property
    def products(self) -> LazySums:
        """``sum_k p_k s_k B_k A_k`` by module."""
        self._declared("products")
        means = LazySums(self.shapes, self._products.mean)
        if self._private is None:
            return means
        sums = self._private.divided(means, self._products.total)
        return self._private.noisy(sums, self._dtype)

    @property
    def starts(self) -> LazySums:
        """``sum_k p_k start_k`` by module: one term per rank class, as its clients decoded it."""
        self._declared("starts")
        means = LazySums(self.shapes, self._mean_start)
        return means if self._private is None else self._private.divided(means, self._total)

    @property
    def linear(self) -> LazySums:
        """``(sum_k p_k L_k) A`` by module, one term for each round's ``A``."""
        self._declared("linear")
        private = self._private
        if private is None:
            return LazySums(self.shapes, self._linear.mean)
        noisy = private.noisy_columns
        return LazySums(self.shapes, lambda name: noisy(name, *self._linear.sum_of(name)))

    @property
    def factors(self) -> FactorSums:
        self._declared("factors")
        return self._factors

    @property
    def factor_changes(self) -> FactorSums:
        self._declared("factor_changes")
        return self._factors

    @property
    def bands(self) -> LazySums:
        self._declared("bands")
        return LazySums(self.shapes, self._bands.mean)

    @property
    def band_changes(self) -> LazySums:
        self._declared("band_changes")
        return LazySums(self.shapes, self._bands.mean)

    @property
    def norms(self) -> ChangeNorms:
        self._declared("norms")
        return self._norms

    def clear(self) -> None:
        """Free the memory and the temporary file of the sums."""
        self._products.clear()
        self._linear.clear()
        self._bands.clear()

    def _mean_start(self, name: str) -> MatrixSum:
        terms = tuple(
            factors_term(weight / self._total, self.sent[rank_class].trained[name])
            for rank_class, weight in sorted(self._start_weights.items())
            if weight
        )
        return MatrixSum(shape=self.shapes[name], terms=terms)

    def _declared(self, name: str) -> None:
        if not getattr(self.needs, name):
            raise LookupError(f"this method did not declare needs = Needs({name}=True).")


def drawn_rows(update: Update, sent: Mapping[str, Start]) -> dict[str, list[int]] | None:
    """Indices of the start's terms that the update has, by module; None for the first ones."""
    start = sent.get(update.rank_class)
    if start is None or not start.local.select:
        return None
    drawn = start.drawn_terms(update.client_id)
    return {name: drawn[name] for name in update.adapter}
