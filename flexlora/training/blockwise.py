"""Adam's moments in 8 bits: a code per number and a float32 scale per block of 256 numbers.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), through
bitsandbytes' own kernels: 2.03 bytes a number in place of 8. A code is an index into a table of 256
numbers whose distances grow with their size, in [-1, 1] for the first moment and [0, 1] for the
second; a number is its block's scale times its table entry.

A block's scale is its largest number; numbers far below it round to zero, which matters most in
the second moment, by which a step is divided. So a block has numbers of one slot, without padding,
and of one factor: the gradients of ``lora_A`` and ``lora_B`` differ in size. That is the layout of
``bnb.optim.AdamW8bit`` over the slot's factors, except that it stores tensors under 4,096 numbers
in 32 bits: here all are in 8.

A call takes all factors of a slot, since one costs 0.3 ms before its first number. A factor that
ends inside a block is filled up with copies of its last number: they take every step with it, and
the block's largest number is the same.

Paged moments are in CUDA's managed memory, which the driver moves to the host when the GPU is full
(QLoRA, arXiv 2305.14314, section 3).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BLOCK", "CHUNK", "BlockwiseMoments", "Live", "live_numbers"]

BLOCK = 256  # numbers that share a scale, in bitsandbytes' kernels
CHUNK = 2**20  # numbers in one call: a CPU kernel allocates 20 bytes for each while it runs


@dataclass(frozen=True, kw_only=True, eq=False)
class Live:
    """A slot's numbers without padding: count by factor, positions in its row (None: all of it).

    ``positions`` ascend, in the order of the slot's row without a cohort.
    """

    sizes: tuple[int, ...]
    positions: Tensor | None = None


def live_numbers(leaves: Sequence[Tensor], labels: Sequence[str], ranks: Sequence[int]) -> Live:
    """The numbers of a row within a slot's ``ranks``; a row is the concatenated leaves.

    A leaf is all slots' ``lora_A [K, R, in]`` or ``lora_B [K, out, R]``, zero beyond a slot's rank.
    """
    inside = []
    for leaf, label, rank in zip(leaves, labels, ranks, strict=True):
        inside_rank = torch.zeros(leaf.shape[1:], dtype=torch.bool, device=leaf.device)
        (inside_rank[:rank] if label == "lora_A" else inside_rank[:, :rank]).fill_(True)
        inside.append(inside_rank.flatten())
    whole = torch.cat(inside)
    sizes = tuple(int(mask.sum()) for mask in inside)
    return Live(sizes=sizes, positions=None if bool(whole.all()) else whole.nonzero().flatten())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Moments of up to ``CHUNK`` of a slot's numbers, at ``where()`` in its row.

    Block b has the numbers from ``starts[b]`` to ``lasts[b]``; without ``starts`` the blocks are
    full and lie at ``span``. Both count without padding: ``positions`` are then those in the row.
    """

    span: slice
    positions: Tensor | None
    first: Tensor
    second: Tensor
    first_scales: Tensor
    second_scales: Tensor
    starts: Tensor | None = None
    lasts: Tensor | None = None

    def where(self) -> slice | Tensor:
        """Indices in the row, computed at each use: they would be larger than the moments."""
        if self.starts is None or self.lasts is None:
            return self.span if self.positions is None else self.positions[self.span]
        within = torch.arange(BLOCK, device=self.starts.device)
        inside = torch.minimum(self.starts[:, None] + within, self.lasts[:, None]).flatten()
        return inside if self.positions is None else self.positions[inside]


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _edges(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """First and last number of every block, of factors that each begin one."""
    starts: list[int] = []
    lasts: list[int] = []
    at = 0
    for size in sizes:
        of_factor = range(at, at + size, BLOCK)
        at += size
        starts += of_factor
        lasts += [min(start + BLOCK, at) - 1 for start in of_factor]
    return starts, lasts


class BlockwiseMoments:
    """Both moments of K slots; ``live`` are each slot's numbers in ``parameters [K, P]``.

    Blocks are independent, so several calls over whole blocks give the same bytes as one.
    """

    def __init__(self, parameters: Tensor, live: Sequence[Live], *, paged: bool = False) -> None:
        from bitsandbytes.functional import create_dynamic_map

        self.paged = paged
        self.signed = create_dynamic_map(signed=True).to(parameters.device)
        self.unsigned = create_dynamic_map(signed=False).to(parameters.device)
        counts = [2 * sum(map(_blocks, slot.sizes)) for slot in live]
        ends = list(itertools.accumulate(counts))
        self._codes = self._allocate(BLOCK * sum(counts), parameters.device)
        self._scales = torch.zeros(sum(counts), device=parameters.device)
        self._spans = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        slots = zip(live, self._spans, strict=True)
        self._parts = [list(self._split(slot, span)) for slot, span in slots]

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, their scales and the two tables."""
        tensors = (self._codes, self._scales, self.signed, self.unsigned)
        return sum(tensor.nbytes for tensor in tensors)

    def step(
        self,
        row: int,
        parameters: Tensor,
        gradients: Tensor,
        *,
        step: int,
        learning_rate: float,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
    ) -> None:
        """AdamW's step ``step`` (from 1) of one slot's ``parameters [P]``, in place."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        for part in self._parts[row]:
            self._prefetch(part)
            where = part.where()
            numbers = parameters[where]  # a view where that is a slice, else a copy
            optimizer_update_8bit_blockwise(
                "adam",
                gradients[where],
                numbers,
                part.first,
                part.second,
                *betas,
                beta3=0.0,
                alpha=0.0,
                eps=epsilon,
                step=step,
                lr=learning_rate,
                qmap1=self.signed,
                qmap2=self.unsigned,
                absmax1=part.first_scales,
                absmax2=part.second_scales,
                weight_decay=weight_decay,
            )
            if isinstance(where, Tensor):
                parameters[where] = numbers

    def settle(self) -> None:
        """Wait for steps on managed memory, which torch treats as host memory."""
        if self.paged:
            torch.cuda.synchronize(self.signed.device)

    def _allocate(self, count: int, device: torch.device) -> Tensor:
        if not self.paged:
            return torch.zeros(count, dtype=torch.uint8, device=device)
        buffer = _borrow(count, device)
        weakref.finalize(self, _unused.append, buffer)
        torch.cuda.synchronize(device)  # an interrupted step may still write to it
        return buffer[:count].zero_()

    def _split(self, live: Live, span: slice) -> Iterator[_Part]:
        """The parts of one slot; ``span`` are the blocks of its first, then its second moments."""
        size, device = sum(live.sizes), self._scales.device
        full = not any(count % BLOCK for count in live.sizes[:-1])
        edges = [] if full else [torch.tensor(side, device=device) for side in _edges(live.sizes)]
        count = (span.stop - span.start) // 2
        for at in range(0, count, CHUNK // BLOCK):
            blocks = min(CHUNK // BLOCK, count - at)
            inside = slice(BLOCK * at, min(BLOCK * (at + blocks), size))
            numbers = inside.stop - inside.start if full else BLOCK * blocks
            first, second = span.start + at, span.start + at + count
            starts, lasts = (side[at : at + blocks] for side in edges) if edges else (None, None)
            yield _Part(
                span=inside,
                positions=live.positions,
                first=self._coded(BLOCK * first, numbers),
                second=self._coded(BLOCK * second, numbers),
                first_scales=self._scales[first : first + blocks],
                second_scales=self._scales[second : second + blocks],
                starts=starts,
                lasts=lasts,
            )

    def _coded(self, start: int, count: int) -> Tensor:
        """A slice of the codes, with the attributes by which bitsandbytes knows managed memory."""
        codes = self._codes[start : start + count]
        if self.paged:
            codes.is_paged, codes.page_deviceid = True, self.signed.device.index  # type: ignore
        return codes

    def _prefetch(self, part: _Part) -> None:
        """Prefetch moments that may have been moved to the host."""
        if self.paged:
            from bitsandbytes.functional import prefetch_tensor

            prefetch_tensor(part.first)
            prefetch_tensor(part.second)


# Managed buffers that no optimizer uses. bitsandbytes cannot free managed memory, and a client
# creates an optimizer in every round.
_unused: list[Tensor] = []


def _borrow(count: int, device: torch.device) -> Tensor:
    """An unused managed buffer of at least ``count`` bytes, or a new one of a power of two.

    With doubling sizes the outgrown buffers together are smaller than the one in use.
    """
    from bitsandbytes.functional import get_paged

    for k, buffer in enumerate(_unused):
        if buffer.numel() >= count and buffer.page_deviceid == device.index:  # type: ignore
            return _unused.pop(k)
    size = 1 << max(1, count - 1).bit_length()
    return get_paged(size, dtype=torch.uint8, device=device)
