"""From the sum of a round to the next ``G``: the server's optimizer, the cap, what the cap drops.

With ``D`` the change that a method asks for and ``G`` the state, all of them kept as factors:

    sgd        G <- G + eta D
    momentum   V <- beta V + D;  G <- G + eta V                (FedAvgM, arXiv 1909.06335)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from flexlora.aggregation.engine.method import State
from flexlora.aggregation.engine.options import UNCAPPED, StepOptions
from flexlora.aggregation.engine.product_sums import svd_term
from flexlora.aggregation.engine.state import GlobalChange
from flexlora.algebra.decompose import Decomposition, LazySums, MatrixSum, decompose
from flexlora.algebra.linalg import FactoredSVD

__all__ = [
    "dropped_share",
    "next_state",
    "pack_svd",
    "tail_of",
    "unpack_svd",
]

Notes = Mapping[str, Mapping[str, float]]


def next_state(
    state: State,
    changes: Mapping[str, MatrixSum],
    step: StepOptions,
    *,
    target: bool = False,
    notes: Notes | None = None,
) -> State:
    """The state after ``changes`` [module], each ``D``, or ``G + D`` itself where ``target``.

    What the cap drops is reported as a share of the energy (Eckart-Young: the smallest possible);
    ``notes`` by module join the report.
    """
    extra, notes = dict(state.extra), notes or {}
    if step.server_optimizer == "sgd":
        eta = step.server_learning_rate
        keep = 1.0 - eta if target else 1.0

        def moved(name: str) -> MatrixSum:
            return _plus(_scaled(changes[name], eta), keep, state.change[name])

        sums: Mapping[str, MatrixSum] = LazySums(state.change, moved)
    else:
        if target:
            changes = {name: _plus(changes[name], -1.0, svd) for name, svd in state.change.items()}
        moves = _moves(state, changes, step, extra)
        notes = {
            name: {**notes.get(name, {}), "velocity_dropped": dropped}
            for name, (_, _, dropped) in moves.items()
        }
        sums = {
            name: MatrixSum(shape=svd.shape, terms=(svd_term(1.0, svd), svd_term(*moves[name][:2])))
            for name, svd in state.change.items()
        }
    return capped(replace(state, extra=extra), sums, step, notes)


def capped(
    state: State, sums: Mapping[str, MatrixSum], step: StepOptions, notes: Notes | None = None
) -> State:
    """The state one round later: ``sums``, each cut at ``step.server_max_rank`` directions."""
    extra, modules, reports = dict(state.extra), {}, {}
    kept = total = 0.0
    if step.error_feedback:
        asked = sums
        dropped = {name: unpack_svd(extra, "dropped", name) for name in asked}
        sums = LazySums(asked, lambda name: _plus(asked[name], 1.0, dropped[name]))
    limit = UNCAPPED if step.error_feedback else step.server_max_rank
    dtype = next(iter(state.change.values())).U.dtype
    for name, result in decompose(sums, max_rank=limit, dtype=dtype).items():
        svd = result.svd.truncate(step.server_max_rank)
        total += result.energy
        kept += float(svd.S.double().square().sum())
        modules[name] = contiguous(svd)
        reports[name] = {**(notes or {}).get(name, {}), **_report(result)}
        if step.error_feedback:
            extra |= pack_svd("dropped", name, tail_of(result.svd, step.server_max_rank))
    return replace(
        state,
        round=state.round + 1,
        change=GlobalChange(modules),
        dropped_energy=max(0.0, 1.0 - kept / total) if total > 0 else 0.0,
        extra=extra,
        modules=reports,
    )


def _moves(
    state: State, changes: Mapping[str, MatrixSum], step: StepOptions, extra: dict
) -> dict[str, tuple[float, FactoredSVD, float]]:
    """``(weight, V, what V's cap drops)`` per module, with the moments in ``extra`` moved on."""
    beta = step.server_momentum
    dtype = next(iter(state.change.values())).U.dtype
    mixed = {}
    for name, change in changes.items():
        last = unpack_svd(state.extra, "velocity", name)
        mixed[name] = _plus(change, beta, last)
    moves = {}
    limit = UNCAPPED if step.error_feedback else step.server_max_rank
    for name, result in decompose(mixed, max_rank=limit, dtype=dtype).items():
        extra |= pack_svd("velocity", name, result.svd)
        moves[name] = (step.server_learning_rate, result.svd, dropped_share(result))
    return moves


def dropped_share(result: Decomposition, rank: int = UNCAPPED) -> float:
    """The share of the energy outside the first ``rank`` directions that were found."""
    kept = float(result.svd.truncate(rank).S.double().square().sum())
    return max(0.0, 1.0 - kept / result.energy) if result.energy > 0 else 0.0


def _report(result: Decomposition) -> dict[str, float | str]:
    return {
        "route": result.route,
        "seconds": result.seconds,
        "error": result.error,
        "energy": result.energy,
    }


def _scaled(change: MatrixSum, weight: float) -> MatrixSum:
    terms = tuple((weight * w, left, right) for w, left, right in change.terms)
    dense = change.dense
    if dense is not None and weight != 1.0:
        dense = dense * weight
    return MatrixSum(shape=change.shape, terms=terms, dense=dense)


def _plus(change: MatrixSum, weight: float, svd: FactoredSVD | None) -> MatrixSum:
    if weight == 0.0 or svd is None or svd.rank == 0:
        return change
    return replace(change, terms=(*change.terms, svd_term(weight, svd)))


def tail_of(svd: FactoredSVD, rank: int) -> FactoredSVD:
    """The directions that ``truncate(rank)`` leaves out."""
    return contiguous(FactoredSVD(U=svd.U[:, rank:], S=svd.S[rank:], Vh=svd.Vh[rank:]))


def contiguous(svd: FactoredSVD) -> FactoredSVD:
    return FactoredSVD(U=svd.U.contiguous(), S=svd.S.contiguous(), Vh=svd.Vh.contiguous())


def pack_svd(kind: str, name: str, svd: FactoredSVD) -> dict[str, torch.Tensor]:
    """An SVD as tensors of ``State.extra``."""
    return {f"{kind}/{name}/{label}": getattr(svd, label) for label in ("U", "S", "Vh")}


def unpack_svd(extra: Mapping[str, torch.Tensor], kind: str, name: str) -> FactoredSVD | None:
    """The inverse of ``pack_svd``; None where there is none."""
    if f"{kind}/{name}/S" not in extra:
        return None
    return FactoredSVD(**{label: extra[f"{kind}/{name}/{label}"] for label in ("U", "S", "Vh")})
