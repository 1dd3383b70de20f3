"""Two ranks: carry much, train little, in the directions that the own gradient asks for.

    client k:  T_c(G) frozen; lora_A = top r right singular vectors of dL_k/dW, lora_B = 0; train
    server:    G <- T_max(G + eta * sum_k p_k s_k B_k A_k)

FlexLoRA makes the rank that a client carries equal to the rank that it trains, and so starts a weak
client from a poorer model. Frozen factors cost a forward pass and no optimizer state, so every
client can carry ``T_c(G)`` at a rank c far above the r that it trains. The method is this project's
own; starting ``lora_A`` in the gradient's row space is the idea of GaLore (arXiv 2403.03507) and
LoRA-GA (arXiv 2407.05000), here per client and round, from a sketch (``flexlora/sketch.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.adapters import Adapter
from flexlora.aggregation.base import Factoring, Law, Start, State, Update
from flexlora.aggregation.products import UpdateBuffer, next_state, product_terms, svd_terms
from flexlora.aggregation.state import GlobalChange
from flexlora.ranks import RankClass
from flexlora.seeds import derive_seed

__all__ = ["Aligned"]


class Aligned:
    """``T_c(G)`` carried by everybody; fresh factors trained and added.

    Args:
        carried_rank: c, capped at what there is; the same for all classes unless a class names its
            own.
        gradient_batches: batches behind the gradient that ``lora_A`` is aligned with; 0 leaves the
            random rows that were sent (the control).
    """

    name = "aligned"
    laws = frozenset(
        {Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS},
    )

    def __init__(
        self,
        *,
        server_learning_rate: float = 1.0,
        max_rank: int = 1 << 30,
        carried_rank: int = 64,
        gradient_batches: int = 1,
    ) -> None:
        self.server_learning_rate, self.max_rank = server_learning_rate, max_rank
        self.carried_rank, self.gradient_batches = carried_rank, gradient_batches

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        shapes = state.change.shapes
        # Rows drawn anew in every round: a client that keeps its rows would train one subspace.
        seed = derive_seed(factoring.seed, "fresh", state.round)
        fresh = GlobalChange.zero(shapes, next(iter(state.change.values())).U.dtype).adapter(
            rank_class.ranks(shapes), factoring.alpha, rslora=factoring.rslora, seed=seed
        )
        return Start(
            rank_class=rank_class,
            base_round=state.round,
            trained=fresh,
            carried=self._carried(state, rank_class, factoring),
            gradient_batches=self.gradient_batches,
        )

    def _carried(self, state: State, rank_class: RankClass, factoring: Factoring) -> Adapter | None:
        """``T_c(G)``, or nothing while ``G`` is zero everywhere."""
        wanted = rank_class.carried_rank or self.carried_rank
        ranks = {name: max(1, min(wanted, svd.rank)) for name, svd in state.change.items()}
        if not any(svd.rank for svd in state.change.values()):
            return None
        return state.change.adapter(ranks, factoring.alpha, rslora=factoring.rslora)

    def begin(self, state: State, sent: Mapping[str, Start]) -> None:
        self._state, self._buffer = state, UpdateBuffer()

    def add(self, update: Update) -> None:
        self._buffer.add(update)

    def finish(self) -> State:
        if not len(self._buffer):
            return self._state.one_round_later()
        weighted, eta = self._buffer.weighted(), self.server_learning_rate
        terms = {
            name: [
                svd_terms(1.0, svd),
                *((eta * weight, B, A) for weight, B, A in product_terms(weighted, name)),
            ]
            for name, svd in self._state.change.items()
        }
        return next_state(self._state, terms, max_rank=self.max_rank)
