"""What the aggregation benchmark adds up: clients, their factors, and the ways of others.

Client types are those of FlexLoRA's heavy tails (arXiv 2402.11505): rank 8 everywhere, 30
everywhere, 30 in attention and 200 in the MLP, 200 everywhere. Factors come in two kinds. In
``noisy`` every client starts from the same ``T_r(G)``, whose values fall as 1/j, and moves each
factor by a fifth of its size in directions of its own. ``gaussian`` are independent factors: a flat
spectrum, the hard case for anything that looks for a top space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.algebra.decompose import MatrixSum, Term

__all__ = ["LIGHT", "STRONG", "Mix", "client_terms", "dense_way", "stack_qr_way"]

MOVE = 0.2


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How many clients of each of the four types there are."""

    name: str
    counts: tuple[int, int, int, int]

    def ranks(self, *, mlp: bool, scale: int = 1) -> list[int]:
        """Every client's rank in one module, divided by ``scale``."""
        types = (8, 30, 200 if mlp else 30, 200)
        return [
            max(1, r // scale) for r, n in zip(types, self.counts, strict=True) for _ in range(n)
        ]


LIGHT = Mix(name="light", counts=(64, 4, 4, 8))
STRONG = Mix(name="strong", counts=(4, 8, 4, 64))


def client_terms(shape: tuple[int, int], ranks: Sequence[int], kind: str, seed: int) -> MatrixSum:
    """The mean of the clients' products as one sum, float32."""
    generator = torch.Generator().manual_seed(seed)
    make = {"noisy": _noisy, "gaussian": _gaussian}[kind]
    return MatrixSum(shape=shape, terms=make(shape, ranks, generator))


def _gaussian(
    shape: tuple[int, int], ranks: Sequence[int], generator: torch.Generator
) -> tuple[Term, ...]:
    m, n = shape
    return tuple(
        (1.0 / len(ranks), _draw(m, rank, generator), _draw(rank, n, generator)) for rank in ranks
    )


def _noisy(
    shape: tuple[int, int], ranks: Sequence[int], generator: torch.Generator
) -> tuple[Term, ...]:
    (m, n), most = shape, max(ranks)
    S = 1.0 / torch.arange(1, most + 1, dtype=torch.float32)
    left = torch.linalg.qr(_draw(m, most, generator))[0] * S
    right = torch.linalg.qr(_draw(n, most, generator))[0].T
    terms = []
    for rank in ranks:
        size = float(S[:rank].square().mean().sqrt())
        B = left[:, :rank] + MOVE * size * m**-0.5 * _draw(m, rank, generator)
        A = right[:rank] + MOVE * n**-0.5 * _draw(rank, n, generator)
        terms.append((1.0 / len(ranks), B, A))
    return tuple(terms)


def _draw(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator)


def dense_way(matrix: MatrixSum, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """FlexLoRA's own: add up the dense products client by client, SVD of the whole, float32."""
    total = torch.zeros(matrix.shape)
    for weight, left, right in matrix.terms:
        total += weight * (left @ right)
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def stack_qr_way(matrix: MatrixSum, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """NVFlare's: stacks with the root of the weight on both sides, float32 QR, SVD of the core."""
    left = torch.cat([weight**0.5 * left for weight, left, _ in matrix.terms], dim=1)
    right = torch.cat([weight**0.5 * right for weight, _, right in matrix.terms])
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(R_left @ R_right.T)
    return (Q_left @ U)[:, :rank], S[:rank], (Vh @ Q_right.T)[:rank]
