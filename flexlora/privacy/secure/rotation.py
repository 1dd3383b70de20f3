"""A random rotation that makes the entries of any vector nearly normal, so that few are clipped.

    R v = H P D v,    D random signs, P a random permutation, H Walsh-Hadamard on blocks

Entries of ``R v`` are sums of up to ``BLOCK`` entries of v with random signs: near ``N(0, |v|^2 /
d)`` where no few entries of v have most of its energy. A fixed range of some deviations then holds
nearly all of them, at any scale of single modules or columns (Suresh et al. 2017, arXiv 1611.00429;
Kairouz et al. 2021, arXiv 2102.06387). The last block overlaps the one before it, so that no vector
is padded: both steps are orthonormal, and so is their product. The seed is public.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flexlora.seeds import numpy_generator

__all__ = ["BLOCK", "Rotation"]

BLOCK = 4096  # numbers; log2 is even, so that H is two products with one 64 x 64 matrix


class Rotation:
    """An orthonormal map of vectors of ``dimension``, a function of ``seed``.

    Costs O(d) beside the products of the blocks, ``2 sqrt(BLOCK)`` multiplications a number.
    """

    def __init__(self, seed: int, dimension: int) -> None:
        generator = numpy_generator(seed, "rotation", dimension)
        self.dimension = dimension
        self.block = 1 << min(BLOCK.bit_length(), dimension.bit_length()) - 1
        places = np.arange(dimension, dtype=np.int32 if dimension < 2**31 else np.int64)
        self._places = torch.from_numpy(generator.permutation(places))
        signs = generator.integers(0, 2, dimension, dtype=np.int8)
        self._signs = torch.from_numpy(signs).mul_(2).sub_(1)

    def forward(self, vector: Tensor) -> Tensor:
        """``R v [dimension]`` in the dtype of the vector."""
        rotated = torch.index_select(vector * self._signs, 0, self._places)
        whole, last = self._blocks()
        rotated[:whole] = self._hadamard(rotated[:whole])
        if whole < self.dimension:
            rotated[last:] = self._hadamard(rotated[last:])
        return rotated

    def inverse(self, rotated: Tensor) -> Tensor:
        """``v [dimension]`` of ``R v``."""
        mixed = rotated.clone()
        whole, last = self._blocks()
        if whole < self.dimension:
            mixed[last:] = self._hadamard(mixed[last:])
        mixed[:whole] = self._hadamard(mixed[:whole])
        vector = torch.empty_like(mixed)
        vector[self._places] = mixed
        return vector.mul_(self._signs)

    def _blocks(self) -> tuple[int, int]:
        """The end of the whole blocks, and where the overlapping last one begins."""
        return self.dimension // self.block * self.block, self.dimension - self.block

    def _hadamard(self, numbers: Tensor) -> Tensor:
        """``H x`` for every block: ``H_(ab) x = H_a X H_b`` with x as ``X [a, b]``; H = H^-1."""
        power = self.block.bit_length() - 1
        left = hadamard(power // 2, numbers.dtype)
        right = hadamard(power - power // 2, numbers.dtype)
        blocks = numbers.view(-1, len(left), len(right))
        return (left @ (blocks @ right)).reshape(-1)


def hadamard(power: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthonormal Walsh-Hadamard matrix ``[2^power, 2^power]``; it is symmetric."""
    matrix, step = torch.ones(1, 1, dtype=dtype), torch.tensor([[1, 1], [1, -1]], dtype=dtype)
    for _ in range(power):
        matrix = torch.kron(matrix, step)
    return matrix / math.sqrt(len(matrix))
