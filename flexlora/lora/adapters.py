"""LoRA factors of one module, and adapters: all modules of a model by name.

The weight change of a module is ``scaling * lora_B @ lora_A`` (LoRA, arXiv 2106.09685, eq. 3), with
``scaling = alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA (arXiv 2312.03732). Ranks and
alphas may differ from module to module and from client to client, so the factors carry
both and every product or sum of them can apply the scaling.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexlora.errors import nearest

__all__ = ["Adapter", "LoRAFactors", "zero_factors"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoRAFactors:
    """``lora_A [rank, in_features]`` and ``lora_B [out_features, rank]`` of one module.

    Raises:
        ValueError: shapes that do not share a rank, a rank of 0, a dtype that is not floating
            point, an alpha that is not positive.
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    rslora: bool = False

    def __post_init__(self) -> None:
        shape_A, shape_B = tuple(self.lora_A.shape), tuple(self.lora_B.shape)
        if len(shape_A) != 2 or len(shape_B) != 2 or shape_A[0] != shape_B[1]:
            raise ValueError(
                f"lora_A has shape {shape_A} and lora_B {shape_B}, expected [rank, in_features] "
                "and [out_features, rank] with one rank. Were the two factors exchanged?"
            )
        if shape_A[0] == 0:
            raise ValueError("the rank is 0, expected at least 1.")
        for label in ("lora_A", "lora_B"):
            dtype = getattr(self, label).dtype
            if not dtype.is_floating_point:
                raise ValueError(f"{label} is {dtype}, expected a floating-point dtype.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha}, expected a positive number.")

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta_weight(self) -> Tensor:
        """``scaling * lora_B @ lora_A``, ``[out_features, in_features]``, in the factors' dtype."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def map(self, function: Callable[[Tensor], Tensor]) -> LoRAFactors:
        """The same factors with ``function`` applied to both tensors."""
        return replace(self, lora_A=function(self.lora_A), lora_B=function(self.lora_B))

    def terms(self, indices: Sequence[int]) -> LoRAFactors:
        """The rank-one terms at ``indices``, with unchanged scaling."""
        rows = torch.tensor(list(indices), dtype=torch.long, device=self.lora_A.device)
        rank = len(rows)
        return replace(
            self,
            lora_A=self.lora_A[rows].contiguous(),
            lora_B=self.lora_B[:, rows].contiguous(),
            alpha=self.scaling * (math.sqrt(rank) if self.rslora else rank),
        )

    @staticmethod
    def side_by_side(parts: Sequence[LoRAFactors]) -> LoRAFactors:
        """``sum_i s_i B_i A_i = [s_1 B_1 ...] @ [A_1; ...]``; scaling 1 unless all are equal."""
        lora_A = torch.cat([part.lora_A for part in parts])
        rank, first = lora_A.shape[0], parts[0]
        if all((p.scaling, p.rslora) == (first.scaling, first.rslora) for p in parts):
            lora_B = torch.cat([part.lora_B for part in parts], dim=1)
            alpha = first.scaling * (math.sqrt(rank) if first.rslora else rank)
            return replace(first, lora_A=lora_A, lora_B=lora_B, alpha=alpha)
        lora_B = torch.cat([part.scaling * part.lora_B for part in parts], dim=1)
        return LoRAFactors(lora_A=lora_A, lora_B=lora_B, alpha=float(rank))


def zero_factors(like: LoRAFactors) -> LoRAFactors:
    """Zero factors of rank 1 in the shape of ``like``."""
    return LoRAFactors(
        lora_A=like.lora_A.new_zeros(1, like.in_features),
        lora_B=like.lora_B.new_zeros(like.out_features, 1),
        alpha=1.0,
    )


class Adapter(Mapping[str, LoRAFactors]):
    """All modules' factors by module name, in sorted order of the names.

    Raises:
        ValueError: no modules at all, or a value that is not ``LoRAFactors``.
    """

    def __init__(self, modules: Mapping[str, LoRAFactors]) -> None:
        if not modules:
            raise ValueError("an adapter needs at least one module, got none.")
        for name, factors in modules.items():
            if not isinstance(factors, LoRAFactors):
                kind = type(factors).__name__
                raise ValueError(f"module '{name}' is a {kind}, expected LoRAFactors.")
        self._modules = {name: modules[name] for name in sorted(modules)}
        self._digest: tuple[tuple[int, ...], str] = ((), "")

    def __getitem__(self, name: str) -> LoRAFactors:
        if name not in self._modules:
            raise KeyError(f"no module '{name}'.{nearest(name, self._modules)}")
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __repr__(self) -> str:
        ranks = sorted({factors.rank for factors in self.values()})
        return f"Adapter({len(self)} modules, ranks {ranks})"

    def delta_weight(self, name: str) -> Tensor:
        """The dense weight change of one module, ``[out_features, in_features]``."""
        return self[name].delta_weight()

    def map(self, function: Callable[[Tensor], Tensor]) -> Adapter:
        """The adapter with ``function`` applied to every tensor."""
        return Adapter({name: factors.map(function) for name, factors in self.items()})

    def to(self, *args: Any, **kwargs: Any) -> Adapter:
        """``Tensor.to`` on every tensor."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(f.lora_A.nbytes + f.lora_B.nbytes for f in self.values())

    def tensors(self) -> dict[str, Tensor]:
        """Contiguous CPU tensors by ``module.lora_A`` and ``module.lora_B``, for a file."""
        return {
            f"{name}.{label}": getattr(factors, label).detach().cpu().contiguous()
            for name, factors in self.items()
            for label in ("lora_A", "lora_B")
        }

    def digest(self) -> str:
        """SHA-256 over names, alphas, dtypes, shapes and bytes: equal only for the same adapter.

        Computed again only if a tensor was changed in place since.
        """
        versions = tuple(t._version for f in self.values() for t in (f.lora_A, f.lora_B))
        if self._digest[0] != versions:
            self._digest = versions, self._sha256()
        return self._digest[1]

    def _sha256(self) -> str:
        sha = hashlib.sha256()
        for name, factors in self.items():
            sha.update(f"{name}|{factors.alpha!r}|{factors.rslora}".encode())
            for tensor in (factors.lora_A, factors.lora_B):
                sha.update(f"|{tensor.dtype}|{tuple(tensor.shape)}".encode())
                data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                sha.update(data.numpy().data)
        return sha.hexdigest()
