"""Score canaries by the global changes of a run, and decide from the scores which ones are in.

    score_ct = <G_t - G_{t-1}, Delta_ct> / |Delta_ct|^2     over all modules, from factors

is near the weight of one client's change in round t where canary c sent its change, near 0 where it
did not. With ``s_t`` the spread of a round's scores over all canaries, q the chance to be sampled
and ``x = score / weight``, the statistic of a canary is the log-likelihood ratio of "in" to "out"

    sum_t log(1 - q + q exp((x_ct - 1/2) weight_t^2 / s_t^2))

under Gaussian scores: the best test of a canary that takes part with probability q a round, near
the sum over rounds under much noise and near their maximum under little. The lower bound on epsilon
holds for any statistic; a poor model of the scores only makes it smaller. Both are functions of the
output alone: who was sampled, and which coin fell how, is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flexlora.aggregation.engine.state import GlobalChange
from flexlora.algebra.linalg import FactoredSVD
from flexlora.lora.adapters import Adapter
from flexlora.privacy.canaries import Canaries

__all__ = ["canary_scores", "in_statistic", "linear_statistic"]

MAD_TO_DEVIATION = 1.4826  # of a Gaussian: deviation over median absolute deviation


def canary_scores(
    before: GlobalChange,
    after: GlobalChange,
    canaries: Canaries,
    starts: Mapping[str, Adapter],
) -> list[float]:
    """The score of each canary of ``starts``, which holds what each would have been sent.

    Costs O(m g (out + in)) a module for m canaries and a change of rank g, in float64.
    """
    client_ids = list(starts)
    total = torch.zeros(len(client_ids), dtype=torch.float64)
    for name in after:
        columns, rows = canaries.changes(client_ids, starts, name)
        total += _inner(after[name], columns, rows) - _inner(before[name], columns, rows)
    return (total / canaries.norm**2).tolist()


def _inner(svd: FactoredSVD, columns: Tensor, rows: Tensor) -> Tensor:
    """``<U S Vh, b_c a_c>`` for each pair of rows of ``[m, out]`` and ``[m, in]``."""
    left = columns @ svd.U.cpu().double()
    right = rows @ svd.Vh.cpu().double().mT
    return (left * svd.S.cpu().double() * right).sum(dim=1)


def in_statistic(
    scores: Sequence[Sequence[float]], weights: Sequence[float], share: float
) -> list[float]:
    """The log-likelihood ratio of every canary; ``scores`` are ``[rounds, m]``.

    ``weights`` are those of one client's change by round, ``share`` is q.
    """
    rounds = np.asarray(scores, dtype=float)
    total = np.zeros(rounds.shape[1])
    with np.errstate(divide="ignore"):
        absent, present = np.log1p(-share), np.log(share)
    for row, weight in zip(rounds, weights, strict=True):
        if spread := _spread(row):
            exponent = (row * weight - weight**2 / 2) / spread**2
            total += np.logaddexp(absent, present + exponent)
    return total.tolist()


def linear_statistic(scores: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """``sum_t x_ct weight_t^2 / s_t^2``: nearly Gaussian, for a fit."""
    rounds = np.asarray(scores, dtype=float)
    total = np.zeros(rounds.shape[1])
    for row, weight in zip(rounds, weights, strict=True):
        if spread := _spread(row):
            total += row * weight / spread**2
    return total.tolist()


def _spread(row: np.ndarray) -> float:
    """The deviation of a round's scores, from the median absolute deviation; 0.0 for equal ones.

    Few canaries take part in a round, and the median does not see them.
    """
    return MAD_TO_DEVIATION * float(np.median(np.abs(row - np.median(row))))
