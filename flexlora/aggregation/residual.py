"""The residual form of FlexLoRA: only what training changed is averaged (DESIGN.md, section 1).

    G <- G + eta * sum_k p_k (s_k B_k A_k - start_k)

``start_k`` is the decoded product that client k really started from: ``T_{r_k}(G)`` over a lossless
wire, its rounded neighbour over a 16-bit one. Nobody trains, nothing changes: no rank collapse
(arXiv 2602.13486) by construction.
"""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.aggregation.base import Factoring, Law, Start, State, Update
from flexlora.aggregation.flexlora import truncated_start
from flexlora.aggregation.products import UpdateBuffer, next_state, product_terms, svd_terms
from flexlora.errors import UpdateRefused
from flexlora.ranks import RankClass

__all__ = ["Residual"]


class Residual:
    """Adds the weighted changes that training made to ``G``, with a server learning rate."""

    name = "residual"
    laws = frozenset(
        {Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS},
    )

    def __init__(self, *, server_learning_rate: float = 1.0, max_rank: int = 1 << 30) -> None:
        self.server_learning_rate, self.max_rank = server_learning_rate, max_rank

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return truncated_start(state, rank_class, factoring)

    def begin(self, state: State, sent: Mapping[str, Start]) -> None:
        self._state, self._sent, self._buffer = state, dict(sent), UpdateBuffer()

    def add(self, update: Update) -> None:
        start = self._sent.get(update.rank_class)
        if self._sent and (start is None or start.digest != update.digest):
            raise UpdateRefused(
                f"client {update.client_id}: the update names start "
                f"'{update.rank_class}/{update.digest[:12]}', which this round did not send; "
                "what it started from cannot be subtracted."
            )
        self._buffer.add(update)

    def finish(self) -> State:
        if not len(self._buffer):
            return self._state.one_round_later()
        weighted = self._buffer.weighted()
        class_shares: dict[str, float] = {}
        for share, update in weighted:
            class_shares[update.rank_class] = class_shares.get(update.rank_class, 0.0) + share
        eta = self.server_learning_rate
        terms = {}
        for name, svd in self._state.change.items():
            trained = [(eta * w, B, A) for w, B, A in product_terms(weighted, name)]
            terms[name] = [svd_terms(1.0, svd), *trained, *self._started(class_shares, name, -eta)]
        return next_state(self._state, terms, max_rank=self.max_rank)

    def _started(self, class_shares: Mapping[str, float], module: str, weight: float) -> list:
        """``weight * sum_class p_class start_class``: one term per class, not per client."""
        terms = []
        for rank_class in sorted(class_shares):
            if rank_class in self._sent:
                start = self._sent[rank_class].trained[module]
                share = weight * class_shares[rank_class] * start.scaling
                terms.append((share, start.lora_B, start.lora_A))
        return terms
