"""Canary clients: updates made at random, whose trace in the global change can be measured.

    canary c, module m:  Delta_cm = b_cm (w_cm A_m),   |Delta_c|_F = norm over all modules

with ``A_m [rank, in]`` the ``lora_A`` that the canary's rank class is sent, and ``b_cm [out]`` and
``w_cm [rank]`` Gaussian directions, the same in all rounds. A canary trains nothing: it adds
``b w / s`` to ``lora_B`` and returns ``lora_A`` as it came. Every method accepts such an update
whose clients send ``lora_B``, and what it adds to its start is ``Delta_c``, of rank one in every
module. At the clip norm it is the largest change that differential privacy lets a client make, in a
direction that no other client shares (Andrew et al. 2023, arXiv 2302.03098).

Half of them, by fair coins, send nothing when they are asked (``one_run.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.seeds import derive_seed, generator

__all__ = ["Canaries"]

PREFIX = "canary_"


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """``count`` canaries; ``secret`` gives their coins and directions, and nothing else.

    Args:
        norm: of what each adds to its start, all modules together.
        num_examples: what each reports; it is a weight where clients count by their examples.
    """

    secret: int
    count: int
    norm: float
    num_examples: int = 1

    @property
    def client_ids(self) -> tuple[str, ...]:
        width = max(3, len(str(self.count - 1)))
        return tuple(f"{PREFIX}{k:0{width}d}" for k in range(self.count))

    def included(self, client_id: str) -> bool:
        """The coin of a canary: whether it sends its change."""
        return derive_seed(self.secret, "coin", client_id) % 2 == 1

    def update(self, client_id: str, start: Adapter) -> Adapter:
        """``start`` with the canary's change in ``lora_B``, in the dtype of the start."""
        modules = {}
        for name, factors in start.items():
            b, w = self._direction(client_id, name, factors, len(start))
            moved = factors.lora_B.double() + torch.outer(b, w) / factors.scaling
            modules[name] = replace(factors, lora_B=moved.to(factors.lora_B))
        return Adapter(modules)

    def changes(
        self, client_ids: Sequence[str], starts: Mapping[str, Adapter], name: str
    ) -> tuple[Tensor, Tensor]:
        """``[m, out]`` and ``[m, in]``: the factors of the canaries' changes of one module.

        ``starts`` has the start of each canary. In float64, never ``[out, in]``.
        """
        columns, rows = [], []
        for client_id in client_ids:
            start = starts[client_id]
            b, w = self._direction(client_id, name, start[name], len(start))
            columns.append(b)
            rows.append(w @ start[name].lora_A.double().cpu())
        return torch.stack(columns), torch.stack(rows)

    def _direction(
        self, client_id: str, name: str, factors: LoRAFactors, num_modules: int
    ) -> tuple[Tensor, Tensor]:
        """``b [out]`` and ``w [rank]`` with ``|b| |w A| = norm / sqrt(num_modules)``, float64."""
        draw = generator(self.secret, "direction", client_id, name)
        b = torch.randn(factors.out_features, generator=draw, dtype=torch.float64)
        w = torch.randn(factors.rank, generator=draw, dtype=torch.float64)
        length = float(b.norm() * (w @ factors.lora_A.double().cpu()).norm())
        return b * (self.norm / math.sqrt(num_modules) / length), w
