"""Bytes of a cohort's pass: the term-by-term prediction of one adapter's, and what each more adds.

``planning/memory.py`` knows a step of one adapter over any number of rows. A cohort's step over the
same rows has the same activations, and of K adapters:

    always      factors, gradients, optimizer state; gradient sketches (``aligned``); carried
                factors, where slots do not share them
    gradients   all factors' gradients a second time, before they are added
    optimizer   temporaries of the step

The copies that go back are made when the widest of these moments are over.

No torch here: the process that starts Ray asks before it has loaded it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexlora.config.resolve import Config
from flexlora.lora.ranks import parse_tiers
from flexlora.planning.memory import MemoryTerms, moments, weight_bytes
from flexlora.planning.memory_ranks import run_plan
from flexlora.planning.planner import USUAL_RANK
from flexlora.planning.rank_policies import paper_types
from flexlora.planning.shapes import ModelShape, TrainingPlan
from flexlora.planning.shares import parse_quantization_shares

__all__ = ["CohortMemory", "largest_rank"]


@dataclass(frozen=True, kw_only=True)
class CohortMemory:
    """A configuration's passes, every client at the largest rank that its policy may give.

    ``bases``: bytes of the weights by quantization, of each quantization that clients use.
    """

    shape: ModelShape
    plan: TrainingPlan
    bases: Mapping[str, int]
    carried_apart: bool

    @classmethod
    def of(cls, config: Config, *, unified: bool) -> CohortMemory:
        """``unified``: host and device are one.

        Raises:
            UserError: a model whose memory cannot be predicted.
        """
        shape, plan = run_plan(config)
        quantization = config.model.quantization
        kinds = {quantization, *parse_quantization_shares(config.clients.quantization)}
        rank = largest_rank(config)
        # What `aligned` carries is the same for all; the tail of `carried` begins after the rank.
        shared = config.method.name == "aligned" or (
            config.method.name == "carried" and config.ranks.policy == "fixed"
        )
        return cls(
            shape=shape,
            plan=replace(plan, rank=rank, quantization=quantization, unified_memory=unified),
            bases={k: sum(weight_bytes(shape, replace(plan, quantization=k))) for k in kinds},
            carried_apart=not shared,
        )

    @property
    def base_bytes(self) -> int:
        """The weights of all bases."""
        return sum(self.bases.values())

    def step_bytes(self, *, slots: int, rows: int) -> int:
        """The widest moment of a pass of ``slots`` clients over ``rows`` of full length.

        The weights are not in it.
        """
        whole = replace(self.plan, batch=rows)
        widest = max(
            terms.total + (slots - 1) * self._another(terms) for terms in moments(self.shape, whole)
        )
        return widest - self.bases[self.plan.quantization]

    def _another(self, terms: MemoryTerms) -> int:
        """What one more slot adds at a moment of the step."""
        always = terms.trained_factors + terms.gradients + terms.optimizer_state + terms.sketches
        carried = terms.carried_factors if self.carried_apart else 0
        meanwhile = {
            "optimizer": terms.backward,
            "gradients": terms.trained_factors,
            "alignment": min(terms.trained_factors, terms.backward),
        }
        return always + carried + meanwhile.get(terms.moment, 0)


def largest_rank(config: Config) -> int:
    """The largest rank that ``ranks.policy`` may give; a usual one where clients decide."""
    policy = config.ranks.policy
    if policy.startswith("paper:"):
        return max(rank_class.largest for rank_class in paper_types(config.ranks.scale))
    if policy == "tiers":
        return max(parse_tiers(config.ranks.tiers))
    return config.ranks.fixed if policy == "fixed" else USUAL_RANK
