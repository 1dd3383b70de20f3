"""From the sum of a round to the next ``G``: the server's optimizer and the cap on the rank.

With ``D`` the change that the method computed, in factored form:

    sgd        G <- G + eta D
    momentum   V <- beta V + D;  G <- G + eta V                (FedAvgM, arXiv 1909.06335)

``eta`` is the option ``server_learning_rate``, or where that is 0 the round's own rate
(``server_rate.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from flexlora.aggregation.engine.options import UNCAPPED, StepOptions
from flexlora.aggregation.engine.product_sums import svd_term
from flexlora.aggregation.engine.server_rate import ChangeNorms
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.algebra.decompose import Decomposition, LazySums, MatrixSum, decompose
from flexlora.algebra.linalg import FactoredSVD

__all__ = [
    "dropped_share",
    "moved_by",
    "moved_to",
    "pack_svd",
    "tail_of",
    "unpack_svd",
]

Notes = Mapping[str, Mapping[str, float]]


def moved_by(
    state: State,
    changes: Mapping[str, MatrixSum],
    step: StepOptions,
    notes: Notes | None = None,
    norms: ChangeNorms | None = None,
) -> State:
    """``G <- G + eta D`` with ``D = changes``, by module; ``notes`` join the report.

    ``norms``: those of the clients' changes, for options whose rate may be 0.
    """
    if norms is not None and not step.server_learning_rate:
        step = step.model_copy(update={"server_learning_rate": norms.rate(changes)})
    if step.server_optimizer == "momentum":
        return _with_momentum(state, changes, step, notes or {})
    eta = step.server_learning_rate

    def moved(name: str) -> MatrixSum:
        return _plus(changes[name].scaled(eta), 1.0, state.change[name])

    return capped(state, LazySums(state.change, moved), step, notes)


def moved_to(state: State, targets: Mapping[str, MatrixSum], step: StepOptions) -> State:
    """``G <- G + eta (M - G)`` with ``M = targets``; at ``eta = 1`` that is ``M``."""
    if step.server_optimizer == "momentum":
        changes = {name: _plus(targets[name], -1.0, svd) for name, svd in state.change.items()}
        return _with_momentum(state, changes, step, {})
    eta = step.server_learning_rate

    def moved(name: str) -> MatrixSum:
        return _plus(targets[name].scaled(eta), 1.0 - eta, state.change[name])

    return capped(state, LazySums(state.change, moved), step)


def _with_momentum(
    state: State, changes: Mapping[str, MatrixSum], step: StepOptions, notes: Notes
) -> State:
    """``V <- beta V + D;  G <- G + eta V``, with ``V`` capped as ``G`` is."""
    extra, reports, sums = dict(state.extra), {}, {}
    mixed = {
        name: _plus(change, step.server_momentum, unpack_svd(state.extra, "velocity", name))
        for name, change in changes.items()
    }
    limit = UNCAPPED if step.error_feedback else step.server_max_rank
    for name, velocity in decompose(mixed, max_rank=limit, dtype=state.dtype).items():
        extra |= pack_svd("velocity", name, velocity.svd)
        reports[name] = {**notes.get(name, {}), "velocity_dropped": dropped_share(velocity)}
        moved = svd_term(step.server_learning_rate, velocity.svd)
        terms = (svd_term(1.0, state.change[name]), moved)
        sums[name] = MatrixSum(shape=velocity.svd.shape, terms=terms)
    return capped(replace(state, extra=extra), sums, step, reports)


def capped(
    state: State, sums: Mapping[str, MatrixSum], step: StepOptions, notes: Notes | None = None
) -> State:
    """The state one round later: ``G = sums``, each cut at ``step.server_max_rank`` directions.

    What the cap drops is reported as a share of the energy (Eckart-Young: the smallest possible);
    with error feedback it is stored in ``extra`` and added to the sum of the next round.
    """
    extra, modules, reports = dict(state.extra), {}, {}
    kept = total = 0.0
    if step.error_feedback:
        uncorrected = sums
        dropped = {name: unpack_svd(extra, "dropped", name) for name in sums}
        sums = LazySums(sums, lambda name: _plus(uncorrected[name], 1.0, dropped[name]))
    limit = UNCAPPED if step.error_feedback else step.server_max_rank
    for name, result in decompose(sums, max_rank=limit, dtype=state.dtype).items():
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
        server_learning_rate=step.server_learning_rate,
    )


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
