"""The server's state between rounds: ``G`` of every module as an SVD, and a method's tensors.

``T_r(G)`` is what a client of rank r is sent (FlexLoRA, arXiv 2402.11505, section 3): the first r
singular directions, split between ``lora_B`` and ``lora_A`` with the scaling divided out, so that
``scaling * lora_B @ lora_A`` is ``T_r(G)`` again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flexlora.algebra.linalg import FactoredSVD, energy_kept, inner_product, live_rows
from flexlora.errors import nearest
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.seeds import generator

__all__ = ["GlobalChange", "State", "effective_rank"]


class GlobalChange(Mapping[str, FactoredSVD]):
    """``G`` of every module by name: ``U [out, g]``, ``S [g]`` nonincreasing, ``Vh [g, in]``."""

    def __init__(self, modules: Mapping[str, FactoredSVD]) -> None:
        self._modules = {name: modules[name] for name in sorted(modules)}

    @classmethod
    def zero(
        cls,
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> GlobalChange:
        """The zero change; ``shapes`` maps a module name to ``(out_features, in_features)``."""
        svds = {name: FactoredSVD.zero(*shape, dtype, device) for name, shape in shapes.items()}
        return cls(svds)

    def __getitem__(self, name: str) -> FactoredSVD:
        if name not in self._modules:
            raise KeyError(f"no module '{name}'.{nearest(name, self._modules)}")
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` by module name."""
        return {name: svd.shape for name, svd in self.items()}

    def map(self, function: Callable[[FactoredSVD], FactoredSVD]) -> GlobalChange:
        return GlobalChange({name: function(svd) for name, svd in self.items()})

    def delta_weight(self, name: str) -> Tensor:
        """The dense change of one module, ``[out_features, in_features]``."""
        return self[name].to_dense()

    def energy_kept(self, rank: int | Mapping[str, int]) -> dict[str, float]:
        """``|T_rank(G)|^2 / |G|^2`` by module; ``rank`` is one number or one per module."""
        ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(self, rank)
        return {name: energy_kept(svd.S, ranks[name]) for name, svd in self.items()}

    def total_energy_kept(self, ranks: Mapping[str, int]) -> float:
        """The same over all modules together: ``sum |T_r(G)|^2 / sum |G|^2``; 1.0 for no change."""
        energies = {name: float(svd.S.double().square().sum()) for name, svd in self.items()}
        total = sum(energies.values())
        if total == 0.0:
            return 1.0
        kept = self.energy_kept(ranks)
        return sum(kept[name] * energy for name, energy in energies.items()) / total

    def energy_in(self, adapter: Adapter) -> float:
        """``1 - |G - M|^2 / |G|^2`` over all modules, M the adapter's products; 1.0 for no change.

        For ``M = T_r(G)`` this is ``total_energy_kept``. From float64 Gram matrices.
        """
        missing = total = 0.0
        adapter = adapter.to(next(iter(self.values())).U.device)
        for name, svd in self.items():
            factors, left = adapter[name], svd.U.double() * svd.S.double()
            whole = inner_product(left, svd.Vh, left, svd.Vh)
            B = factors.scaling * factors.lora_B.double()
            cross = inner_product(left, svd.Vh, B, factors.lora_A)
            missing += whole - 2.0 * cross + inner_product(B, factors.lora_A, B, factors.lora_A)
            total += whole
        return 1.0 - max(missing, 0.0) / total if total > 0 else 1.0

    def effective_rank(self) -> float:
        """Mean over modules of the effective rank of ``S``; 0 for no modules."""
        values = [effective_rank(svd.S) for svd in self.values()]
        return sum(values) / len(values) if values else 0.0

    def adapter(
        self,
        rank: int | Mapping[str, int],
        alpha: float,
        *,
        rslora: bool = False,
        seed: int = 0,
    ) -> Adapter:
        """``T_rank(G)`` as LoRA factors, every module at exactly its rank (capped at min(out, in)).

        Where ``G`` has fewer directions than the rank, the rest is random rows in ``lora_A`` and
        zero columns in ``lora_B``: with zeros in both, both gradients would stay zero. The random
        rows are nested across ranks. The factors have the dtype of ``G`` (float32 or float64,
        whatever the clients sent) and are where it is.
        """
        ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(self, rank)
        return Adapter(
            {
                name: _factors(
                    svd,
                    min(ranks[name], *svd.shape),
                    alpha=alpha,
                    rslora=rslora,
                    rows=generator(seed, "live", name),
                )
                for name, svd in self.items()
            }
        )

    def full_rank_adapter(self, alpha: float, *, rslora: bool = False) -> Adapter:
        """``G`` without truncation: every module at the rank of its SVD, at least 1."""
        ranks = {name: max(1, svd.rank) for name, svd in self.items()}
        return self.adapter(ranks, alpha, rslora=rslora)


@dataclass(frozen=True, kw_only=True)
class State:
    """The server's model after ``round`` rounds (0: before any training).

    ``extra`` has a method's tensors (mean factors, momentum, dropped directions) and is part of a
    checkpoint. ``modules`` are the metrics of the last round by module: the route of its
    decomposition, seconds, error; ``server_learning_rate`` is the rate of its step.
    """

    round: int
    change: GlobalChange
    dropped_energy: float = 0.0
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    server_learning_rate: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which ``G`` is stored: float32 or float64."""
        return next(iter(self.change.values())).U.dtype

    @property
    def device(self) -> torch.device:
        """Where ``G`` is and the sums of a round are made; updates are moved there."""
        return next(iter(self.change.values())).U.device

    def unchanged(self) -> State:
        """The state after a round that added no update."""
        return replace(
            self,
            round=self.round + 1,
            dropped_energy=0.0,
            modules={},
            server_learning_rate=None,
        )


def effective_rank(S: Tensor) -> float:
    """``exp(H(S / sum S))`` (Roy and Vetterli, 2007); 0 for no directions."""
    if S.numel() == 0:
        return 0.0
    shares = S.double() / S.double().sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


def _factors(
    svd: FactoredSVD,
    rank: int,
    *,
    alpha: float,
    rslora: bool,
    rows: torch.Generator,
) -> LoRAFactors:
    """``T_rank`` with its singular values in ``lora_B`` and the scaling divided out."""
    top = svd.truncate(rank)
    out_features, in_features = svd.shape
    lora_B = svd.U.new_zeros(out_features, rank)
    lora_A = live_rows(rank, in_features, rows).to(svd.Vh)
    factors = LoRAFactors(lora_A=lora_A, lora_B=lora_B, alpha=alpha, rslora=rslora)
    lora_B[:, : top.rank] = (top.U.double() * top.S.double() / factors.scaling).to(lora_B.dtype)
    lora_A[: top.rank] = top.Vh.to(lora_A.dtype)
    return factors
