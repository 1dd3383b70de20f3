"""The linear form of updates that share one frozen ``lora_A``, and their weighted sums.

    Delta_k = s_k B_k A[:r_k] = L_k A,       L_k = s_k B_k padded with zero columns, [out, R]
    sum_k p_k Delta_k = (sum_k p_k L_k) A,   exact at unequal ranks
    |Delta_k|_F = |L_k|_F                    where the rows of A are orthonormal

``A [R, in]`` is the same for all clients of a round, and a client of rank r has its first r rows.
``L_k`` is all that the server has to learn of a client, and only its sum: masks of a secure sum and
the clipping and noise of differential privacy apply to it. FFA-LoRA (arXiv 2403.12313) makes the
same observation for one A of all rounds and equal ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.algebra.decompose import MatrixSum
from flexlora.errors import UpdateRefused
from flexlora.lora.adapters import Adapter, LoRAFactors

__all__ = ["LinearSums", "check_basis", "linear_norm", "linear_update", "scaled_columns"]


def scaled_columns(factors: LoRAFactors, rank: int | None = None) -> Tensor:
    """``L = s B`` of one module in float64, ``[out, rank]`` with zeros beyond the module's rank.

    Raises:
        ValueError: ``rank`` is below that of the factors.
    """
    missing = 0 if rank is None else rank - factors.rank
    if missing < 0:
        raise ValueError(f"rank is {rank}, expected at least {factors.rank}, that of the factors.")
    return torch.nn.functional.pad(factors.scaling * factors.lora_B.double(), (0, missing))


def linear_update(
    adapter: Mapping[str, LoRAFactors], ranks: Mapping[str, int]
) -> dict[str, Tensor]:
    """``L_k`` of every module, float64 ``[out, ranks[module]]``: the vector that a client adds."""
    return {name: scaled_columns(factors, ranks[name]) for name, factors in adapter.items()}


def linear_norm(adapter: Mapping[str, LoRAFactors]) -> float:
    """``|L_k|_F`` over all modules together, in float64.

    It is the norm of what is summed, whatever ``lora_A`` is; that of the products, ``|Delta_k|_F``,
    only as far as the rows are orthonormal: over a 16-bit wire to within 0.4 %.
    """
    return math.sqrt(sum(float(scaled_columns(f).square().sum()) for f in adapter.values()))


def same_first_rows(first: Tensor, second: Tensor) -> bool:
    """Whether the shorter ``lora_A`` is, bit by bit, the first rows of the longer one."""
    rows = min(first.shape[0], second.shape[0])
    return first.dtype == second.dtype and torch.equal(first[:rows], second[:rows])


def check_basis(client_id: str, adapter: Adapter, sent: Adapter) -> None:
    """Refuse an update whose ``lora_A`` is not the one that was sent: it is frozen.

    Raises:
        UpdateRefused: names the client and the module.
    """
    for name, factors in adapter.items():
        if not same_first_rows(factors.lora_A, sent[name].lora_A.to(factors.lora_A.device)):
            raise UpdateRefused(
                f"client {client_id}, module '{name}': lora_A is not the one that it was sent, "
                "which all clients of a round share and nobody trains."
            )


@dataclass(kw_only=True)
class _Columns:
    """``sum_k w_k L_k [out, R]`` over the clients whose ``lora_A`` is the first rows of ``A``."""

    A: Tensor
    total: Tensor

    def add(self, factors: LoRAFactors, weight: float) -> None:
        if factors.rank > self.A.shape[0]:
            self.A = factors.lora_A
        missing = self.A.shape[0] - self.total.shape[1]
        self.total = torch.nn.functional.pad(self.total, (0, missing))
        self.total[:, : factors.rank] += weight * scaled_columns(factors)


class LinearSums:
    """``sum_k w_k L_k`` and ``sum_k w_k``: of every module one sum for each ``A``.

    All updates of a round share one ``A``; late ones have that of an earlier round. Float64,
    ``[out, R]`` a module; R grows to the largest rank that was added, and memory does not grow with
    the number of clients.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._columns: dict[str, list[_Columns]] = {}

    def add(self, adapter: Mapping[str, LoRAFactors], weight: float) -> None:
        """Add ``weight`` times one client's ``L_k``."""
        self.total += weight
        for name, factors in adapter.items():
            known = self._columns.setdefault(name, [])
            columns = next((c for c in known if same_first_rows(c.A, factors.lora_A)), None)
            if columns is None:
                total = torch.zeros_like(factors.lora_B, dtype=torch.float64)
                columns = _Columns(A=factors.lora_A, total=total)
                known.append(columns)
            columns.add(factors, weight)

    def add_sum(self, sums: Mapping[str, Tensor], A: Mapping[str, Tensor], weight: float) -> None:
        """Add ``sum_k w_k L_k [out, R]`` of many clients, whose ``w_k`` add up to ``weight``.

        ``A`` holds the R rows or more of every module.
        """
        self.total += weight
        for name, total in sums.items():
            columns = _Columns(A=A[name][: total.shape[1]], total=total.to(A[name].device))
            self._columns.setdefault(name, []).append(columns)

    def mean(self, name: str) -> MatrixSum:
        """``sum_k p_k Delta_k`` of a module: one term ``[out, R] @ [R, in]`` for each ``A``."""
        known = self._columns[name]
        return MatrixSum(
            shape=(known[0].total.shape[0], known[0].A.shape[1]),
            terms=tuple((1.0, columns.total / self.total, columns.A) for columns in known),
        )

    def clear(self) -> None:
        self._columns = {}
