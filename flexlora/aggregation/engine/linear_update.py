"""The linear form of updates that share one frozen ``lora_A``, and their weighted sums.

    Delta_k = L_k A,   L_k = s_k B_k - s B_start, padded with zero columns, [out, R]
    sum_k p_k Delta_k = (sum_k p_k L_k) A,   exact at unequal ranks
    |Delta_k|_F = |L_k|_F                    where the rows of A are orthonormal

``A [R, in]`` is the same for all clients of a round, and a client of rank r has its first r rows.
``B_start`` is zero in ``basis``, where clients train ``lora_B`` anew in every round.
``L_k`` is all that the server has to learn of a client, and only its sum: masks of a secure sum and
the clipping and noise of differential privacy apply to it. FFA-LoRA (arXiv 2403.12313) makes the
same observation for one A of all rounds and equal ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.algebra.decompose import MatrixSum
from flexlora.errors import UpdateRefused
from flexlora.lora.adapters import Adapter, LoRAFactors

__all__ = [
    "LinearSums",
    "check_basis",
    "linear_norm",
    "linear_update",
    "scaled_columns",
    "widest_start",
]


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


def linear_norm(
    adapter: Mapping[str, LoRAFactors], start: Mapping[str, LoRAFactors] | None = None
) -> float:
    """``|L_k|_F`` over all modules together, in float64; ``start`` None: one of zeros.

    It is the norm of what is summed, whatever ``lora_A`` is; that of the products, ``|Delta_k|_F``,
    only as far as the rows are orthonormal: over a 16-bit wire to within 0.4 %.
    """
    parts = (_change(factors, name, start) for name, factors in adapter.items())
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


def _change(factors: LoRAFactors, name: str, start: Mapping[str, LoRAFactors] | None) -> Tensor:
    """``s B - s B_start`` of one module, ``[out, rank]``."""
    columns = scaled_columns(factors)
    return columns if start is None else columns - scaled_columns(start[name]).to(columns.device)


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

    @classmethod
    def zero(cls, factors: LoRAFactors) -> _Columns:
        """No client yet, at the rank of ``factors`` and over their ``lora_A``."""
        return cls(A=factors.lora_A, total=torch.zeros_like(factors.lora_B, dtype=torch.float64))

    def add(self, A: Tensor, columns: Tensor, weight: float) -> None:
        if A.shape[0] > self.A.shape[0]:
            self.A = A
        missing = self.A.shape[0] - self.total.shape[1]
        self.total = torch.nn.functional.pad(self.total, (0, missing))
        self.total[:, : A.shape[0]] += weight * columns


class LinearSums:
    """``sum_k w_k L_k`` and ``sum_k w_k``: of every module one sum for each ``A``.

    All updates of a round share one ``A``; late ones have that of an earlier round. Float64,
    ``[out, R]`` a module; memory does not grow with the number of clients. R grows to the largest
    rank that was added, or is at least that of the adapter ``widest``.
    """

    def __init__(self, widest: Mapping[str, LoRAFactors] | None = None) -> None:
        self.total = 0.0
        self._columns = {name: [_Columns.zero(f)] for name, f in (widest or {}).items()}

    def add(
        self,
        adapter: Mapping[str, LoRAFactors],
        weight: float,
        start: Mapping[str, LoRAFactors] | None = None,
    ) -> None:
        """Add ``weight`` times one client's ``L_k``."""
        self.total += weight
        for name, factors in adapter.items():
            known = self._columns.setdefault(name, [])
            columns = next((c for c in known if same_first_rows(c.A, factors.lora_A)), None)
            if columns is None:
                columns = _Columns.zero(factors)
                known.append(columns)
            columns.add(factors.lora_A, _change(factors, name, start), weight)

    def mean(self, name: str) -> MatrixSum:
        """``sum_k p_k Delta_k`` of a module: one term ``[out, R] @ [R, in]`` for each ``A``."""
        known = self._columns[name]
        return MatrixSum(
            shape=(known[0].total.shape[0], known[0].A.shape[1]),
            terms=tuple((1.0, columns.total / self.total, columns.A) for columns in known),
        )

    def sum_of(self, name: str) -> tuple[Tensor, Tensor]:
        """``sum_k w_k L_k [out, R]`` and the ``A [R, in]`` of a module that all updates share.

        Raises:
            ValueError: updates over different ``A``.
        """
        (columns,) = self._columns[name]
        return columns.total, columns.A

    def clear(self) -> None:
        self._columns = {}


def widest_start(starts: Iterable[Mapping[str, LoRAFactors]]) -> dict[str, LoRAFactors]:
    """By module the factors of the largest rank among ``starts``, which share their first rows."""
    widest: dict[str, LoRAFactors] = {}
    for start in starts:
        for name, factors in start.items():
            if name not in widest or factors.rank > widest[name].rank:
                widest[name] = factors
    return widest
