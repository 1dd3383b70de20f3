"""The linears of a served model: the frozen product plus the blocks of all adapters in the step.

    y = x W^T + bias,  and for each block (``block_plan.py``)  y_block += mask(x_block A^T) B

Three kernel calls a block, however many adapters and ranks are in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from flexlora.serving.block_plan import Block
from flexlora.serving.rank_arena import RankArena

__all__ = ["ServedLinear", "ServedModel"]


class ServedLinear(nn.Module):
    """A frozen linear; ``blocks`` is the plan of the step, shared by all layers of the model."""

    def __init__(self, base: nn.Module, name: str, arena: RankArena, blocks: list[Block]) -> None:
        super().__init__()
        self.base, self.name = base, name
        self.arena, self.blocks = arena, blocks

    @property
    def weight(self) -> Any:
        """The frozen weight; models read its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        out = self.base(x, *args, **kwargs)
        if not self.blocks or not self.arena.users[self.name]:
            return out
        A, B = self.arena.A[self.name], self.arena.B[self.name]
        tokens, sums = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if sums.dtype == A.dtype:
            self._add(tokens, sums, A, B)
            return out
        wide = sums.to(A.dtype)  # a 16-bit base: the factors' products stay in float32
        self._add(tokens.to(A.dtype), wide, A, B)
        return wide.to(out.dtype).view(out.shape)

    def _add(self, x: Tensor, sums: Tensor, A: Tensor, B: Tensor) -> None:
        for block in self.blocks:
            hidden = x[block.start : block.stop] @ A[block.first : block.last].T
            if block.foreign is not None:  # filled, not multiplied: infinity times 0 is NaN
                hidden.masked_fill_(block.foreign, 0.0)
            sums[block.start : block.stop].addmm_(hidden, B[block.first : block.last])


class ServedModel:
    """``model`` with ``ServedLinear`` in place of the arena's modules, until ``remove``."""

    def __init__(self, model: Any, arena: RankArena) -> None:
        self.model, self.blocks = model, list[Block]()
        self._before: dict[str, nn.Module] = {}
        for name in arena.shapes:
            base = model.get_submodule(name)
            self._before[name] = base
            _put(model, name, ServedLinear(base, name, arena, self.blocks))

    def set_blocks(self, blocks: Sequence[Block]) -> None:
        """The plan of the next step."""
        self.blocks[:] = blocks

    def remove(self) -> None:
        """Put the plain linears back."""
        _put_all(self.model, self._before)
        self._before = {}


def _put_all(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        _put(model, name, module)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
