"""raFLoRA (arXiv 2602.13486): bands of rank, each weighted over the clients that reach it.

    M = sum_j sum_{k: r_k > j} (n_k / N_j) s_k B_k[:, j] A_k[j],    N_j = sum_{k: r_k > j} n_k

FlexLoRA's average gives direction j the share of the clients that hold it, so the tail collapses;
here the weights of every band add up to one. A band that no client of the round reaches is lost,
unless error feedback adds back what the rule itself would take from ``G`` if nobody trained.
Bands are of singular directions: a start turned towards the last one would mix them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from flexlora.aggregation.engine.method import Factoring, Law, Start, State, Update
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.options import StepOptions
from flexlora.aggregation.engine.product_sums import ProductSums
from flexlora.aggregation.engine.server_step import next_state
from flexlora.aggregation.engine.truncated import StartedFrom, truncated_start
from flexlora.algebra.decompose import MatrixSum, Term
from flexlora.lora.adapters import LoRAFactors
from flexlora.lora.ranks import RankClass

__all__ = ["RaFLoRA"]


class RaFLoRA:
    """Rank-partitioned averaging of the products, and ``T_r`` of it for every rank class."""

    name = "raflora"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ONE_CLIENT})

    Options = StepOptions

    def __init__(self, options: StepOptions) -> None:
        self.options = options
        if options.error_feedback:
            self.laws = self.laws - {Law.ONE_CLIENT} | {Law.ZERO_TRAINING}

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return truncated_start(state, rank_class, factoring)

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> OpenRound:
        bands, started = _Bands(state, sent), StartedFrom(sent)
        feedback = self.options.error_feedback

        def add(update: Update) -> None:
            bands.add(update.adapter, update.num_examples)
            if feedback and update.rank_class in sent:
                bands.subtract(sent[update.rank_class].trained, update.num_examples)

        def close() -> State:
            return next_state(state, bands.sums(), self.options, target=not feedback)

        admit = started.admit if feedback else None
        return OpenRound(state, sent, clients, fold=add, close=close, admit=admit)


class _Bands:
    """One weighted sum per module and band; bands end where some class's rank does."""

    def __init__(self, state: State, sent: Mapping[str, Start]) -> None:
        self.shapes = state.change.shapes
        self._ends = {
            name: sorted({start.trained[name].rank for start in sent.values()})
            for name in self.shapes
        }
        self._sums: dict[tuple[str, int], ProductSums] = {}

    def add(self, adapter: Mapping[str, LoRAFactors], num_examples: float) -> None:
        for name, factors in adapter.items():
            for first, band in self._split(name, factors):
                self._sum(name, first).add({name: band}, num_examples)

    def subtract(self, adapter: Mapping[str, LoRAFactors], num_examples: float) -> None:
        """Take away what a client started from, in the weights that its update counts with."""
        for name, factors in adapter.items():
            for first, band in self._split(name, factors):
                self._sum(name, first).subtract({name: band}, num_examples)

    def _split(self, name: str, factors: LoRAFactors) -> list[tuple[int, LoRAFactors]]:
        ends: Sequence[int] = self._ends[name] or range(1, factors.rank + 1)
        cuts = [0, *(end for end in ends if end < factors.rank), factors.rank]
        return [(first, factors.terms(range(first, last))) for first, last in pairwise(cuts)]

    def _sum(self, name: str, first: int) -> ProductSums:
        key = (name, first)
        if key not in self._sums:
            self._sums[key] = ProductSums({name: self.shapes[name]})
        return self._sums[key]

    def sums(self) -> dict[str, MatrixSum]:
        """The bands of every module together, each divided by its own clients' examples."""
        whole = {}
        for name, shape in self.shapes.items():
            terms: tuple[Term, ...] = ()
            dense = None
            for key in sorted(key for key in self._sums if key[0] == name):
                part = self._sums[key].take(name)
                terms += part.terms
                if part.dense is not None:
                    dense = part.dense if dense is None else dense.add_(part.dense)
            whole[name] = MatrixSum(shape=shape, terms=terms, dense=dense)
        return whole
