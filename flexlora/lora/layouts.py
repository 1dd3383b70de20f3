"""The form of adapters on disk: the scaling is inside ``lora_B``, in one of two layouts.

    portable   one rank for all modules, those of lower rank padded with zeros; alpha = rank
    compact    every module at its own rank; alpha = the largest rank, for all modules

Inference runtimes disagree on ``rank_pattern``, ``alpha_pattern`` and rsLoRA (``runtimes.py``).
Neither layout has the latter two, and ``portable`` has no patterns at all: every runtime computes
``lora_B @ lora_A`` times 1. At equal ranks both layouts are the same.
"""

from __future__ import annotations

from typing import Literal

import torch

from flexlora.lora.adapters import Adapter, LoRAFactors

__all__ = ["Layout", "laid_out"]

Layout = Literal["portable", "compact"]


def laid_out(adapter: Adapter, layout: Layout) -> Adapter:
    """``adapter`` with the same ``delta_weight``, in ``layout``; alpha is the largest rank.

    ``lora_B`` is scaled in float64 and rounded once to its dtype: exact where the scaling is a
    power of two.
    """
    rank = max(factors.rank for factors in adapter.values())
    modules = {}
    for name, factors in adapter.items():
        own = rank if layout == "portable" else factors.rank
        scale = factors.scaling * own / rank
        lora_A = torch.nn.functional.pad(factors.lora_A, (0, 0, 0, own - factors.rank))
        lora_B = torch.nn.functional.pad(factors.lora_B, (0, own - factors.rank))
        scaled = (scale * lora_B.double()).to(lora_B.dtype)
        modules[name] = LoRAFactors(lora_A=lora_A, lora_B=scaled, alpha=float(rank))
    return Adapter(modules)
