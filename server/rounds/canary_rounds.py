"""Score the canaries of an audited simulation after each round, into the run's record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexlora.aggregation.engine.state import State
from flexlora.privacy.canary_scores import canary_scores
from flexlora.runs.canary_file import CanaryRecord
from flexlora.server.settings import factoring_of
from flexlora.wire.encoding import over_the_wire

if TYPE_CHECKING:
    from flexlora.server.strategy import FlexLoRAStrategy

__all__ = ["CanaryRounds"]


@dataclass(kw_only=True)
class CanaryRounds:
    """Compares each global change with the one before it, along every canary's direction."""

    record: CanaryRecord

    def score(self, strategy: FlexLoRAStrategy, before: State) -> None:
        """Add the round that led from ``before`` to the strategy's state.

        A canary's start is computed for its rank class whether or not anyone of it was sampled.
        """
        config, record = strategy.config, self.record
        members = strategy.roster.members
        held = {c: members[c].rank_class for c in record.canaries.client_ids if c in members}
        record.classes = {client_id: rank_class.name for client_id, rank_class in held.items()}
        starts = {}
        for rank_class in set(held.values()):
            trained = strategy.method.start(before, rank_class, factoring_of(config)).trained
            starts[rank_class.name] = over_the_wire(trained, config.wire.dtype)
        scores = canary_scores(
            before.change,
            strategy.state.change,
            record.canaries,
            {client_id: starts[name] for client_id, name in record.classes.items()},
        )
        rate = strategy.state.server_learning_rate
        weight = (1.0 if rate is None else rate) / (record.share * len(members))
        record.rounds[strategy.metrics.server_round] = weight, scores
