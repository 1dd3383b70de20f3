"""How inference runtimes scale the modules of a PEFT folder, as of November 2026.

From their sources: which of ``rank_pattern``, ``alpha_pattern`` and ``use_rslora`` they read. PEFT
reads all three. A runtime that ignores one applies the product at another strength, without an
error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from flexlora.lora.peft_config import PeftConfig

__all__ = ["RUNTIMES", "Runtime", "misreading", "vllm_max_rank"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One runtime's reading of ``adapter_config.json``.

    Args:
        unequal_ranks: ``read``: alpha over each module's own rank; ``ignored``: over ``r``;
            ``refused``: it loads no such folder.
        max_ranks: the values of ``max_lora_rank`` that it takes; empty: any.
    """

    name: str
    unequal_ranks: Literal["read", "ignored", "refused"] = "read"
    alpha_pattern: bool = True
    rslora: bool = True
    max_ranks: tuple[int, ...] = ()

    def scaling(self, config: PeftConfig, module: str) -> float:
        """What this runtime multiplies ``lora_B @ lora_A`` of ``module`` with."""
        rank = config.rank if self.unequal_ranks == "ignored" else config.rank_of(module)
        alpha = config.alpha_of(module) if self.alpha_pattern else config.alpha
        return alpha / (math.sqrt(rank) if self.rslora and config.rslora else rank)


_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
RUNTIMES = (
    Runtime(name="PEFT 0.21"),
    Runtime(name="vLLM 0.32 and later", max_ranks=_VLLM_RANKS),
    Runtime(name="vLLM up to 0.31", unequal_ranks="ignored", alpha_pattern=False),
    Runtime(name="SGLang 0.5", unequal_ranks="refused", alpha_pattern=False, rslora=False),
    Runtime(name="llama.cpp", alpha_pattern=False, rslora=False),
)


def misreading(runtime: Runtime, config: PeftConfig, modules: Iterable[str]) -> str:
    """Why ``runtime`` would not apply these modules as PEFT does; empty where it would."""
    names = sorted(modules)
    ranks = {config.rank_of(name) for name in names}
    if runtime.unequal_ranks == "refused" and len(ranks) > 1:
        return f"refuses ranks that differ, here {min(ranks)} to {max(ranks)}"
    if runtime.max_ranks and max(ranks) > runtime.max_ranks[-1]:
        return f"takes ranks up to {runtime.max_ranks[-1]}, here {max(ranks)}"
    for name in names:
        factor = runtime.scaling(config, name) / RUNTIMES[0].scaling(config, name)
        if not math.isclose(factor, 1.0, rel_tol=1e-6):
            return f"would apply module '{name}' at {factor:.3g} times its strength"
    return ""


def vllm_max_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` of vLLM that takes ``rank``; None where none does."""
    return next((allowed for allowed in _VLLM_RANKS if allowed >= rank), None)
