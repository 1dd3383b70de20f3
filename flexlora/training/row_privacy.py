"""DP-SGD for the slots of a cohort (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

    a step takes every row of the client with probability q = min(1, b / n), independently
    gradient = (sum over its rows of g_i min(1, C / |g_i|)  +  N(0, (z C)^2)) / (q n)

``g_i`` is the gradient of one row: of the mean loss over its answer tokens, so that a long answer
counts as a short one, and over all trained factors. b is the batch (``examples_per_step``), n the
number of rows, and q n, a constant, the divisor: how many rows were drawn is private. A step
without any row is noise. What follows (FedProx's pull, the bound on the gradient's norm, the
optimizer) is post-processing.

Rows and noise come from a seed of the slot's, which the operating system gives: everybody knows the
run's. The noise is on the slot's numbers and never on their padding, so it is the same in a cohort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexlora.errors import UserError
from flexlora.seeds import derive_seed, numpy_generator, secret_seed
from flexlora.training.blockwise import Live
from flexlora.training.schedule import TrainSettings, sample_share
from flexlora.wire.jobs import TrainJob

__all__ = ["RowPrivacy"]


@dataclass(kw_only=True)
class RowPrivacy:
    """The rows and the noise of every slot.

    Args:
        seeds: one for each slot.
        num_rows: n of each slot.
        live: each slot's numbers without padding.
    """

    settings: TrainSettings
    seeds: Sequence[int]
    num_rows: Sequence[int]
    live: Sequence[Live]
    _generators: dict[int, torch.Generator] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        settings: TrainSettings,
        jobs: Sequence[TrainJob],
        num_rows: Sequence[int],
        live: Sequence[Live],
    ) -> RowPrivacy:
        """New seeds for the jobs of a cohort.

        Raises:
            UserError: a training in which a row's gradient is not its only influence.
        """
        if settings.lora_dropout:
            raise UserError(
                f"lora.dropout is {settings.lora_dropout:g} with clipped rows: a row's mask "
                "depends on which rows come before it; set it to 0."
            )
        if any(job.start.local.gradient_batches for job in jobs):
            raise UserError(
                "this method aligns lora_A with the gradient of the rows, which no noise covers, "
                "before the first step; use one that does not, such as carried."
            )
        purpose = [("rows", job.server_round, job.client_id) for job in jobs]
        known = settings.reproducible
        seeds = [derive_seed(settings.seed, *p) if known else secret_seed() for p in purpose]
        return cls(settings=settings, seeds=seeds, num_rows=num_rows, live=live)

    def plan(self, slot: int, steps: int) -> list[list[int]]:
        """The rows of every step of a slot; some steps may have none."""
        draw, count = numpy_generator(self.seeds[slot], "sample"), self.num_rows[slot]
        share = sample_share(count, self.settings)
        return [(draw.random(count) < share).nonzero()[0].tolist() for _ in range(steps)]

    @torch.no_grad()
    def privatize(self, gradients: Tensor, active: int) -> None:
        """Turn the first ``active`` clipped sums of ``[K, P]`` into noisy mean gradients."""
        deviation = self.settings.row_clip * self.settings.row_noise
        for slot in range(active):
            row, numbers = gradients[slot], self.live[slot]
            noise = deviation * self._normal(slot, sum(numbers.sizes), row)
            if numbers.positions is None:
                row += noise
            else:
                row.index_add_(0, numbers.positions, noise)
            count = self.num_rows[slot]
            row /= sample_share(count, self.settings) * count

    def _normal(self, slot: int, count: int, like: Tensor) -> Tensor:
        """The next ``count`` normal numbers of a slot."""
        if slot not in self._generators:
            seed = derive_seed(self.seeds[slot], "noise")
            self._generators[slot] = torch.Generator(like.device).manual_seed(seed)
        drawn = self._generators[slot]
        return torch.randn(count, generator=drawn, device=like.device, dtype=like.dtype)
