"""Weighted sums of the factors themselves, for the methods that average ``lora_A`` and ``lora_B``.

Factors of unequal rank are added row by row (column by column); a client counts in the rows of its
rank only. The scaling is absorbed into ``lora_B``, since it differs between ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flexlora.lora.adapters import LoRAFactors

__all__ = ["FactorSums", "Pair"]

Pair = tuple[Tensor, Tensor]


class FactorSums:
    """``sum_k w_k A_k [R, in]``, ``sum_k w_k s_k B_k [out, R]``, and the weight of each row.

    Float64, on ``device``, where the factors are; R grows to the largest rank that was added.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], device: torch.device | str = "cpu"
    ) -> None:
        self.total = 0.0
        none = torch.zeros(0, dtype=torch.float64, device=device)
        self._A = {name: none.new_zeros(0, fan_in) for name, (_, fan_in) in shapes.items()}
        self._B = {name: none.new_zeros(out, 0) for name, (out, _) in shapes.items()}
        self._weight = dict.fromkeys(shapes, none)

    def add(
        self,
        factors: Mapping[str, LoRAFactors],
        weight: float,
        rows: Mapping[str, Sequence[int]] | None = None,
        minus: Mapping[str, LoRAFactors] | None = None,
    ) -> None:
        """Add one client's factors minus ``minus``, the factors that it started from.

        ``rows`` are the indices of its terms in the mean (default: the first ones).
        """
        self.total += weight
        for name, trained in factors.items():
            own = list(rows[name] if rows else range(trained.rank))
            self._grow(name, max(own) + 1)
            at = torch.tensor(own, device=self._A[name].device)
            A, B = trained.lora_A.double(), trained.scaling * trained.lora_B.double()
            if minus is not None:
                A = A - minus[name].lora_A.double()
                B = B - minus[name].scaling * minus[name].lora_B.double()
            self._A[name][at] += weight * A
            self._B[name][:, at] += weight * B
            self._weight[name][at] += weight

    def _grow(self, name: str, rank: int) -> None:
        missing = rank - self._A[name].shape[0]
        if missing > 0:
            pad = torch.nn.functional.pad
            self._A[name] = pad(self._A[name], (0, 0, 0, missing))
            self._B[name] = pad(self._B[name], (0, missing))
            self._weight[name] = pad(self._weight[name], (0, missing))

    def mean(self, name: str) -> Pair:
        """``A [R, in]`` and ``s B [out, R]`` over all clients; a missing row counts as zeros."""
        return self._A[name] / self.total, self._B[name] / self.total

    def mean_of_holders(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of each row over the clients that have it, and a mask ``[R]`` of such rows."""
        weight = self._weight[name]
        divisor = torch.where(weight > 0, weight, 1.0)
        return self._A[name] / divisor[:, None], self._B[name] / divisor, weight > 0
