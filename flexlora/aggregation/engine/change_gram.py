"""Inner products of a round's changes from their factors, at any ranks, in float64.

    <L R, L' R'> = sum over (L^T L') * (R R'^T)          [m, r] @ [r, n],  [m, r'] @ [r', n]
    D_k = s_k B_k A_k - start_k,   G[i, j] = sum over modules of <D_i, D_j>

Products and starts of a module are stacked side by side, so that two matrix products give all their
inner products; a start is that of a whole rank class and is stacked once. Stacks are cut into
blocks, of which two are in memory at a time: memory is ``2 BLOCK_BYTES`` and the ``[n, n]`` result,
whatever the number of updates. With b blocks a module's factors are read (b + 1) / 2 times, and the
cost is O((m + n) R^2) a module, R the sum of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.aggregation.engine.waiting import StoredAdapter, WaitingUpdates
from flexlora.algebra.gram import gram_matrix
from flexlora.lora.adapters import Adapter

__all__ = ["change_gram", "gram_of_waiting"]

BLOCK_BYTES = 1 << 26
BLOCK_RANK = 2048  # ranks of a block: its products of factors are [R, R] matrices


def gram_of_waiting(
    waiting: WaitingUpdates,
    keys: Sequence[str],
    starts: Mapping[str, Adapter],
    device: torch.device | str = "cpu",
) -> Tensor:
    """``G`` of the waiting updates ``keys``; ``starts`` are those of the rank classes by name.

    An update of none of these classes counts whole.
    """
    of_update = [waiting.get(key).rank_class for key in keys]
    names = sorted({name for name in of_update if name in starts})
    return change_gram(
        [waiting.stored(key) for key in keys],
        [StoredAdapter(adapter=starts[name]) for name in names],
        [names.index(name) if name in names else None for name in of_update],
        list(waiting.get(keys[0]).adapter),
        device=device,
    )


def change_gram(
    updates: Sequence[StoredAdapter],
    starts: Sequence[StoredAdapter],
    start_of: Sequence[int | None],
    modules: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """``G [n, n]`` of ``updates`` less their ``starts`` (by index; None: of zero), symmetric.

    Raises:
        ValueError: an entry that is NaN or infinite: an update was not checked.
    """
    n, count = len(updates), len(updates) + len(starts)
    products = torch.zeros(count, count, dtype=torch.float64, device=device)
    for name in modules:
        _add_products(products, [*updates, *starts], name, block_bytes)
    differences = torch.eye(n, count, dtype=torch.float64, device=device)
    for k, start in enumerate(start_of):
        if start is not None:
            differences[k, n + start] = -1.0
    gram = differences @ products @ differences.T
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("inner products of the updates are not finite; check_update was left out.")
    return (gram + gram.T) / 2.0


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Factors side by side, ``left [m, R]`` and ``right [R, n]``, and the stack's members.

    ``owners [R, members]`` has a 1 where a column belongs to a member.
    """

    left: Tensor
    right: Tensor
    owners: Tensor

    def products(self, other: _Block) -> Tensor:
        """Inner products of the members of two blocks, ``[members, members]``."""
        if other is self:  # half the products
            by_rank = gram_matrix(self.left) * gram_matrix(self.right.T)
        else:
            by_rank = (self.left.T @ other.left) * (self.right @ other.right.T)
        return self.owners.T @ by_rank @ other.owners


def _add_products(
    total: Tensor, stack: Sequence[StoredAdapter], name: str, block_bytes: int
) -> None:
    """Add the inner products of one module, block by block."""
    spans = list(_spans(stack, name, block_bytes))
    for i, span in enumerate(spans):
        block = _load(stack[span], name, total.device)
        total[span, span] += block.products(block)
        for other in spans[i + 1 :]:
            cross = block.products(_load(stack[other], name, total.device))
            total[span, other] += cross
            total[other, span] += cross.T


def _spans(stack: Sequence[StoredAdapter], name: str, block_bytes: int) -> Iterator[slice]:
    """Runs of members that fit in a block, of at least one member each."""
    first = rank = 0
    for k, member in enumerate(stack):
        factors = member.adapter[name]
        most = min(BLOCK_RANK, block_bytes // (8 * (factors.out_features + factors.in_features)))
        if k > first and rank + factors.rank > most:
            yield slice(first, k)
            first, rank = k, 0
        rank += factors.rank
    yield slice(first, len(stack))


def _load(stack: Sequence[StoredAdapter], name: str, device: torch.device) -> _Block:
    factors = [member.read(name) for member in stack]
    owner = [k for k, module in enumerate(factors) for _ in range(module.rank)]
    owners = torch.nn.functional.one_hot(torch.tensor(owner), len(factors))
    return _Block(
        left=torch.cat([f.scaling * f.lora_B.to(device).double() for f in factors], dim=1),
        right=torch.cat([f.lora_A.to(device).double() for f in factors]),
        owners=owners.double().to(device),
    )
