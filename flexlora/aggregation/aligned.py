"""Two ranks: carry much, train little, in the directions that the own gradient asks for.

    client k:  T_c(G) frozen; lora_A = top r right singular vectors of dL_k/dW, lora_B = 0; train
    server:    G <- T_max(G + eta * sum_k p_k s_k B_k A_k)

FlexLoRA makes the rank that a client carries equal to the rank that it trains, and so starts a weak
client from a poorer model. Frozen factors cost a forward pass and no optimizer state, so every
client can carry ``T_c(G)`` at a rank c far above the r that it trains. The method is this
project's own; starting ``lora_A`` in the gradient's row space is the idea of GaLore (arXiv
2403.03507) and LoRA-GA (arXiv 2407.05000), here per client and round, from a sketch
(``algebra/sketch.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from flexlora.aggregation.engine.method import Factoring, Law, LocalPlan, Start, State
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.options import FastStepOptions, StepOptions
from flexlora.aggregation.engine.product_sums import ProductSums
from flexlora.aggregation.engine.server_step import next_state
from flexlora.aggregation.engine.state import GlobalChange
from flexlora.algebra.decompose import LazySums
from flexlora.algebra.linalg import FactoredSVD
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.seeds import derive_seed

__all__ = ["Aligned", "begin_sum", "carried_directions", "fresh_factors"]


class Aligned:
    """``T_c(G)`` carried by everybody; fresh factors trained and added."""

    name = "aligned"
    laws = frozenset(
        {Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS},
    )

    class Options(FastStepOptions):
        carried_rank: int = Field(
            default=32, ge=1, description="rank of the frozen factors, where a class names no other"
        )
        carried_dtype: Literal["", "float32", "bfloat16"] = Field(
            default="", description="dtype of the frozen factors (empty: wire.dtype)"
        )
        gradient_batches: int = Field(
            default=1,
            ge=0,
            description="batches to align lora_A with (0: random rows)",
        )

    def __init__(self, options: Options) -> None:
        self.options = options
        self.local = LocalPlan(gradient_batches=options.gradient_batches)

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        last = rank_class.carried_rank or self.options.carried_rank
        return Start(
            rank_class=rank_class,
            base_round=state.round,
            trained=fresh_factors(state, rank_class, factoring),
            carried=carried_directions(state, dict.fromkeys(state.change, 0), last, factoring),
            carried_dtype=self.options.carried_dtype,
            local=self.local,
        )

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> OpenRound:
        return begin_sum(state, sent, clients, self.options)


def begin_sum(
    state: State,
    sent: Mapping[str, Start],
    clients: Mapping[str, str] | None,
    step: StepOptions,
) -> OpenRound:
    """A round that adds the weighted products: fresh factors start from nothing."""
    products = ProductSums(state.change.shapes)

    def close() -> State:
        return next_state(state, LazySums(state.change, products.mean), step)

    return OpenRound(state, sent, clients, products=products, close=close)


def fresh_factors(state: State, rank_class: RankClass, factoring: Factoring) -> Adapter:
    """Random ``lora_A``, zero ``lora_B``; drawn anew in every round.

    A client that kept its rows would train in one subspace for ever.
    """
    shapes = state.change.shapes
    nothing = GlobalChange.zero(shapes, next(iter(state.change.values())).U.dtype)
    seed = derive_seed(factoring.seed, "fresh", state.round)
    return nothing.adapter(
        rank_class.ranks(shapes), factoring.alpha, rslora=factoring.rslora, seed=seed
    )


def carried_directions(
    state: State, first: Mapping[str, int], last: int, factoring: Factoring
) -> Adapter | None:
    """Directions ``first`` (by module) to ``last`` of ``G`` as factors; None if there are none."""

    def between(name: str, svd: FactoredSVD) -> FactoredSVD:
        span = slice(first[name], last)
        return FactoredSVD(U=svd.U[:, span], S=svd.S[span], Vh=svd.Vh[span])

    rest = GlobalChange({name: between(name, svd) for name, svd in state.change.items()})
    if not any(svd.rank for svd in rest.values()):
        return None
    return rest.full_rank_adapter(factoring.alpha, rslora=factoring.rslora)
