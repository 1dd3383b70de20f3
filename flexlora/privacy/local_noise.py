"""Local differential privacy: a client clips its change and adds noise before anything leaves it.

    sent = start + clip(s (B - B_start), C) + N(0, (z C)^2),     in the units of  s lora_B  [out, r]

``lora_A`` is the server's and frozen, so the change of ``s lora_B`` is all that the client adds,
and linear: the server's weighted sum has the weighted sum of the noises. Whatever the rows are,
whichever way they are trained on, the clipped change is at most C long; two of them are at most 2C
apart (``client_rounds.py``). What follows, the wire's encoding among it, is post-processing.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from flexlora.aggregation.engine.starts import Start
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.seeds import derive_seed, generator, secret_seed
from flexlora.wire.jobs import TrainJob, TrainResult

__all__ = ["noisy_change", "privatized"]


def privatized(result: TrainResult, job: TrainJob, config: Config) -> TrainResult:
    """The result as it may leave the client; unchanged unless ``privacy.mode`` is ``local``.

    A training that diverged leaves as noise alone, and losses are withheld: both are of the rows.
    A failure before the first step has a cause and no factors.

    Raises:
        UserError: the job trains more than ``lora_B``, so that noise would not cover it.
    """
    if config.privacy.mode != "local":
        return result
    start = job.start.for_client(job.client_id)
    if start.trainable != ("lora_B",):
        raise UserError(
            f"the server sends {' and '.join(start.trainable)} to be trained with "
            "privacy.mode=local, expected lora_B alone: noise covers its change and no other."
        )
    unknown = math.nan
    adapter, diverged = result.adapter, result.adapter is None and result.steps > 0
    if adapter is not None or diverged:
        purpose = ("local noise", job.server_round, job.client_id)
        known = config.privacy.reproducible
        seed = derive_seed(config.seed, *purpose) if known else secret_seed()
        privacy = config.privacy
        adapter = noisy_change(adapter, start, privacy.clip, privacy.noise_multiplier, seed)
    return replace(
        result,
        adapter=adapter,
        cause="" if diverged else result.cause,
        personal=None,
        withheld=True,
        tokens=0,
        train_loss=unknown,
        loss_before=unknown,
        loss_after=unknown,
    )


def noisy_change(
    adapter: Adapter | None, start: Start, clip: float, noise_multiplier: float, seed: int
) -> Adapter:
    """``start`` with the clipped change of ``s lora_B`` and noise on every number of it.

    No adapter, or one whose change is not finite, has the change zero. Float64 within.
    """
    changes = {
        name: sent.scaling * (_trained(adapter, name, sent) - sent.lora_B.double())
        for name, sent in start.trained.items()
    }
    norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
    finite = math.isfinite(norm)
    factor = min(1.0, clip / norm) if norm > 0.0 else 1.0
    modules = {}
    for name, sent in start.trained.items():
        draw = generator(seed, name)
        noise = torch.randn(sent.lora_B.shape, generator=draw, dtype=torch.float64)
        moved = noise_multiplier * clip * noise + (factor * changes[name] if finite else 0.0)
        lora_B = sent.lora_B.double() + moved / sent.scaling
        modules[name] = replace(sent, lora_B=lora_B.to(sent.lora_B.dtype))
    return Adapter(modules)


def _trained(adapter: Adapter | None, name: str, sent: LoRAFactors) -> torch.Tensor:
    return (sent if adapter is None else adapter[name]).lora_B.detach().cpu().double()
