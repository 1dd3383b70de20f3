"""How likely a model finds each row's answer: its mean log-probability, and Min-K%++.

    z_t = (log p(x_t) - mean_v log p(v)) / deviation_v log p(v),     v ~ p( . | x_<t)
    Min-K%++ = the mean of the smallest K % of z_t    (Zhang et al. 2024, arXiv 2404.02936)

A token at a mode of the model's distribution has a large z, whatever the entropy there. Training
makes modes of the tokens that it sees, and the least likely tokens of a row are the last to follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora.data.collation import Example, collate
from flexlora.evaluation.generation import passes
from flexlora.training.local import answer_logits
from flexlora.training.slots import SlotModel

__all__ = ["LOWEST_SHARE", "row_scores"]

LOWEST_SHARE = 0.2  # K of Min-K%++


@torch.no_grad()
def row_scores(
    slots: SlotModel, examples: Sequence[Example], *, batch_size: int, pad_token_id: int
) -> tuple[list[float], list[float]]:
    """Mean log-probability and Min-K%++ of each row's answer under what ``slots`` has loaded."""
    means, lowest = [0.0] * len(examples), [0.0] * len(examples)
    for (chosen,) in passes([[len(row.input_ids) for row in examples]], batch_size):
        rows = [examples[i] for i in chosen]
        logits, labels, _ = answer_logits(slots, collate([rows], pad_token_id=pad_token_id))
        log_p, z = _token_scores(logits, labels)
        counts = [row.answer_tokens for row in rows]
        for i, p, least in zip(chosen, log_p.split(counts), z.split(counts), strict=True):
            means[i] = float(p.mean())
            count = math.ceil(LOWEST_SHARE * len(least))
            lowest[i] = float(least.sort().values[:count].mean())
    return means, lowest


def _token_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``log p(x_t)`` and ``z_t`` of ``logits [n, vocabulary]``, both ``[n]``."""
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    mean = (p * log_p).sum(dim=1)
    variance = (p * (log_p - mean[:, None]).square()).sum(dim=1)
    chosen = log_p.gather(1, labels[:, None])[:, 0]
    # A distribution that is certain has no deviation; its token is the mode.
    return chosen, (chosen - mean) / variance.sqrt().clamp_min(1e-6)
