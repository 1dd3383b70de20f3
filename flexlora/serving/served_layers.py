"""The linears of a served model: the frozen product plus the blocks of all adapters in the step.

    y = x W^T + bias,  and for each block (``block_plan.py``)  y_block += mask(x_block A^T) B

Three kernel calls a block, however many adapters and ranks are in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flexlora.serving.block_plan import Block
from flexlora.serving.rank_arena import RankArena

__all__ = ["ServedLinear", "ServedModel", "StepBlocks"]


@dataclass(kw_only=True)
class StepBlocks:
    """The plan of a step of ``tokens`` tokens, known to all layers of a model."""

    blocks: Sequence[Block] = ()
    tokens: int = 0


class ServedLinear(nn.Module):
    """A frozen linear and the blocks of the step."""

    def __init__(self, base: nn.Module, name: str, arena: RankArena, step: StepBlocks) -> None:
        super().__init__()
        self.base, self.name = base, name
        self.arena, self.step = arena, step

    @property
    def weight(self) -> Any:
        """The frozen weight; models read its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        out = self.base(x, *args, **kwargs)
        if not self.step.blocks or not self.arena.users[self.name]:
            return out
        A, B = self.arena.A[self.name], self.arena.B[self.name]
        tokens, sums = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if len(tokens) != self.step.tokens:
            raise ValueError(
                f"module '{self.name}' got {len(tokens)} tokens, expected the {self.step.tokens} "
                "of the step. Does the model sort or drop tokens before it?"
            )
        if sums.dtype == A.dtype:
            self._add(tokens, sums, A, B)
            return out
        wide = sums.to(A.dtype)  # a 16-bit base: the factors' products stay in float32
        self._add(tokens.to(A.dtype), wide, A, B)
        return wide.to(out.dtype).view(out.shape)

    def _add(self, x: Tensor, sums: Tensor, A: Tensor, B: Tensor) -> None:
        for block in self.step.blocks:
            hidden = x[block.start : block.stop] @ A[block.first : block.last].T
            if block.foreign is not None:  # filled, not multiplied: infinity times 0 is NaN
                hidden.masked_fill_(block.foreign, 0.0)
            sums[block.start : block.stop].addmm_(hidden, B[block.first : block.last])


class ServedModel:
    """``model`` with ``ServedLinear`` in place of the arena's modules, until ``remove``."""

    def __init__(self, model: Any, arena: RankArena) -> None:
        self.model, self.step = model, StepBlocks()
        self._before: dict[str, nn.Module] = {}
        for name in arena.shapes:
            base = model.get_submodule(name)
            self._before[name] = base
            _put(model, name, ServedLinear(base, name, arena, self.step))

    def plan(self, blocks: Sequence[Block], tokens: int) -> None:
        """What the next step does."""
        self.step.blocks, self.step.tokens = blocks, tokens

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
