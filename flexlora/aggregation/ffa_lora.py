"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): ``lora_A`` frozen and shared.

    A fixed, nested across ranks;    B <- B + sum_k p_k pad(s_k B_k - s_k B_start)

With A shared the mean of the products is the product of the means, so nothing is lost in averaging;
only ``lora_B`` is trained and sent back. At equal ranks this is the paper's mean of B. Where ranks
differ the mean is of the changes, so that a column that few clients have does not shrink.
"""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.aggregation.engine.factor_sums import FactorSums, changed_state, factor_start
from flexlora.aggregation.engine.method import Factoring, Law, Start, State, Update
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.options import MethodOptions
from flexlora.aggregation.engine.truncated import StartedFrom
from flexlora.lora.ranks import RankClass

__all__ = ["FFALoRA", "begin_changes"]


class FFALoRA:
    """Trains and averages ``lora_B`` alone."""

    name = "ffa-lora"
    laws = frozenset(
        {Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS},
    )

    Options = MethodOptions

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        return factor_start(state, rank_class, factoring, trainable=("lora_B",))

    def begin(
        self, state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None = None
    ) -> OpenRound:
        return begin_changes(state, sent, clients)


def begin_changes(
    state: State, sent: Mapping[str, Start], clients: Mapping[str, str] | None
) -> OpenRound:
    """A round that adds the mean change of the factors, one of which nobody changes."""
    sums = FactorSums(state.change.shapes)

    def fold(update: Update) -> None:
        start = sent.get(update.rank_class)
        minus = start.trained if start is not None else None
        sums.add(update.adapter, update.num_examples, minus=minus)

    def close() -> State:
        return changed_state(state, sent, sums)

    return OpenRound(state, sent, clients, fold=fold, close=close, admit=StartedFrom(sent).admit)
