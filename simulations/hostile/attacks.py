"""Updates of hostile clients, computed from the honest ones of the same round.

The attackers know everything: the honest changes ``D_k``, the server's rule, how many hostile
updates it withstands, and the bound on norms, below which they stay.

    sign-flip         -D_k of the attacker's own training
    scaling           D_k of its own training, as long as the bound on norms lets pass
    alie              mu - tau sigma sign(mu), coordinate by coordinate (Baruch et al. 2019,
                      arXiv 1902.06156)
    inner-product     mu - tau mu (Xie et al. 2020, arXiv 1903.03936)
    mimic             the honest change that is farthest out along their first principal axis
                      (Karimireddy et al. 2022, arXiv 2006.09365)
    backdoor-boosted  D_k of training on poisoned rows, times n / f (Bagdasaryan et al. 2020,
                      arXiv 1807.00459), as far as the bound on norms lets pass

``mu`` and ``sigma`` are mean and deviation of the honest changes. ``tau`` is the one of a grid that
moves the server's result farthest from ``mu`` (Shejwalkar and Houmansadr 2021). What a client sends
has its rank, so the change is cut to the best approximation that its factors can express.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora.aggregation.engine.robust_rules import RobustMean
from flexlora.aggregation.engine.starts import Start
from flexlora.lora.adapters import Adapter, LoRAFactors

__all__ = ["Change", "Round", "change_of", "crafted", "factors_of"]

Change = Mapping[str, Tensor]  # dense float64, by module
BELOW_BOUND = 0.9
GRID = [0.1 * 1.35**k for k in range(24)]  # up to 99


@dataclass(frozen=True, kw_only=True)
class Round:
    """What the attackers know: honest changes, their own number, the server's rule and bound.

    ``robust`` is None for the plain mean; ``norm_ratio`` is ``server.max-norm-ratio``, 0 for none.
    """

    honest: Sequence[Change]
    hostile: int
    robust: RobustMean | None
    norm_ratio: float

    @property
    def mean(self) -> Change:
        names = self.honest[0]
        return {n: torch.stack([D[n] for D in self.honest]).mean(dim=0) for n in names}

    @property
    def largest_norm(self) -> float:
        """The norm up to which an update passes: 0.9 of the bound, or of 50 times the median."""
        norms = sorted(_norm(D) for D in self.honest)
        return BELOW_BOUND * (self.norm_ratio or 50.0) * norms[(len(norms) - 1) // 2]


def crafted(attack: str, known: Round, own: Change) -> Change:
    """The change that an attacker wants to send; ``own`` is that of its training."""
    if attack == "sign-flip":
        return _times(-1.0, own)
    if attack == "scaling":
        return _times(known.largest_norm / max(_norm(own), 1e-30), own)
    if attack == "backdoor-boosted":
        boost = (len(known.honest) + known.hostile) / known.hostile
        return _times(min(boost, known.largest_norm / max(_norm(own), 1e-30)), own)
    if attack == "mimic":
        return _farthest(known.honest)
    mean = known.mean
    step = mean if attack == "inner-product" else _against(known.honest, mean)
    return _minus(mean, _best_step(known, step), step)


def _against(honest: Sequence[Change], mean: Change) -> Change:
    """``sigma sign(mu)`` of every coordinate."""
    return {n: torch.stack([D[n] for D in honest]).std(dim=0) * mean[n].sign() for n in mean}


def _farthest(honest: Sequence[Change]) -> Change:
    gram = _gram(honest)
    centre = torch.eye(len(gram), dtype=gram.dtype) - 1.0 / len(gram)
    first = torch.linalg.eigh(centre @ gram @ centre)[1][:, -1]
    return honest[int(first.abs().argmax())]


def _best_step(known: Round, step: Change) -> float:
    """The tau of ``mu - tau step`` with which the server's result is farthest from ``mu``."""
    count = len(known.honest)
    gram = _gram([*known.honest, step])
    mean = torch.cat([torch.full((count,), 1.0 / count), torch.zeros(1)]).double()
    honest = torch.eye(count, count + 1, dtype=torch.float64)
    best, farthest = 0.0, -1.0
    for tau in GRID:
        attack = mean.clone()
        attack[-1] = -tau
        if float(attack @ gram @ attack) > known.largest_norm**2:
            break
        rows = torch.cat([attack.expand(known.hostile, -1), honest])
        shares = _shares(known, rows @ gram @ rows.T)
        moved = shares @ rows - mean
        if (distance := float(moved @ gram @ moved)) > farthest:
            best, farthest = tau, distance
    return best


def _shares(known: Round, gram: Tensor) -> Tensor:
    if known.robust is None or len(gram) < known.robust.least:
        return torch.full_like(gram[0], 1.0 / len(gram))
    return known.robust.coefficients(gram)


def _gram(changes: Sequence[Change]) -> Tensor:
    rows = (torch.stack([D[name].flatten() for D in changes]) for name in changes[0])
    return sum((flat @ flat.T for flat in rows), torch.zeros((), dtype=torch.float64))


def _norm(change: Change) -> float:
    return math.sqrt(sum(float(D.square().sum()) for D in change.values()))


def _times(factor: float, change: Change) -> Change:
    return {name: factor * D for name, D in change.items()}


def _minus(first: Change, factor: float, second: Change) -> Change:
    return {name: D - factor * second[name] for name, D in first.items()}


def change_of(adapter: Adapter, start: Start) -> Change:
    """``s B A - start`` as dense float64 matrices."""
    return {n: _product(f) - _product(start.trained[n]) for n, f in adapter.items()}


def factors_of(change: Change, start: Start) -> Adapter:
    """The factors of this start's ranks whose product is nearest to that of the start plus change.

    A factor that the client does not train is as it was sent, and the other one is least squares.
    """
    modules = {}
    for name, sent in start.trained.items():
        target = (_product(sent) + change[name]) / sent.scaling
        modules[name] = _nearest(target, sent, start.trainable)
    return Adapter(modules)


def _nearest(target: Tensor, sent: LoRAFactors, trainable: Sequence[str]) -> LoRAFactors:
    A, B = sent.lora_A.double(), sent.lora_B.double()
    if "lora_A" not in trainable:
        B = target @ torch.linalg.pinv(A)
    elif "lora_B" not in trainable:
        A = torch.linalg.pinv(B) @ target
    else:
        U, S, Vh = torch.linalg.svd(target, full_matrices=False)
        roots = S[: sent.rank].sqrt()
        B, A = U[:, : sent.rank] * roots, roots[:, None] * Vh[: sent.rank]
    return replace(sent, lora_A=A.to(sent.lora_A), lora_B=B.to(sent.lora_B))


def _product(factors: LoRAFactors) -> Tensor:
    return factors.scaling * (factors.lora_B.double() @ factors.lora_A.double())
