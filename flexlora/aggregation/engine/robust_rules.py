"""Robust means of a round's changes, as functions of their Gram matrix ``G[i, j] = <D_i, D_j>``.

Each rule returns coefficients ``c [n]`` that sum to 1: its result is ``sum_k c_k D_k``, again a
weighted sum of the clients' products, at any ranks and without a full-size matrix. ``hostile`` is
the number of updates that may be anything (f below).

    multi-krum         mean of the n - f changes whose n - f - 1 nearest others are nearest
                       (Blanchard et al. 2017, arXiv 1703.02757)
    geometric-median   argmin_v sum_k |D_k - v|, by Weiszfeld's iteration (Pillutla et al. 2022,
                       arXiv 1912.13445)
    centred-clipping   v <- v + mean_k min(1, tau / |D_k - v|) (D_k - v)   (Karimireddy et al.
                       2021, arXiv 2012.10333), to its fixed point
    trimmed-mean       mean of each coordinate without its f smallest and f largest values (Yin et
                       al. 2018, arXiv 1803.01498), in principal axes of the changes

before which ``mixed`` may replace each change by the mean of its n - f nearest ones (Allouah et
al. 2023, arXiv 2302.01772). All changes count alike: the number of examples is a client's claim.

Two choices are ours. The trimmed mean depends on the basis, and the entries of a weight matrix are
an arbitrary one: the principal axes need the Gram matrix alone, and rotating all changes rotates
the result. Clipping is iterated within the round, since the paper's centre, the last round's mean,
is near a change only where clients send momenta: at the fixed point it is Huber's estimator, with
``tau`` the median distance to the centre.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "RULES",
    "RobustMean",
    "centred_clipping",
    "geometric_median",
    "mixed",
    "multi_krum",
    "nearest_means",
    "squared_distances",
    "trimmed_mean",
]

STEPS = 200
CONVERGED = 1e-9  # of a coefficient in one step
ROUNDING = 1e-12  # a coefficient below it is none
RESOLVED = 1e-12  # of the largest eigenvalue: an axis is a millionth of the longest
SMOOTHING = 1e-3  # of the median distance: below it all changes weigh alike

Rule = Callable[[Tensor, int], Tensor]


def squared_distances(gram: Tensor) -> Tensor:
    """``|D_i - D_j|^2``, ``[n, n]``; rounding never makes one negative."""
    energy = gram.diagonal()
    distances = (energy[:, None] + energy - gram - gram.T).clamp_min(0.0)
    return distances.fill_diagonal_(0.0)


def multi_krum(gram: Tensor, hostile: int) -> Tensor:
    """The same coefficient for the ``n - f`` changes of lowest score, 0 for the others.

    A score is the sum of the squared distances to the ``n - f - 1`` nearest others, as in ByzFL
    (the paper has one less); of equal scores the first ones are chosen.
    """
    count = len(gram) - hostile
    nearest = squared_distances(gram).sort(dim=1).values
    scores = nearest[:, 1:count].sum(dim=1)
    chosen = torch.zeros_like(scores)
    chosen[scores.sort(stable=True).indices[:count]] = 1.0 / count
    return chosen


def geometric_median(gram: Tensor, hostile: int = 0) -> Tensor:
    """``c_k`` in proportion to ``1 / |D_k - v|``, smoothed; the number of hostile ones is not used.

    Its breakdown point is one half, whatever ``hostile`` is.
    """

    def step(_: Tensor, distances: Tensor, radius: float) -> Tensor:
        return _weiszfeld_step(distances, SMOOTHING * radius)

    return _fixed_point(gram, step)


def centred_clipping(gram: Tensor, hostile: int = 0) -> Tensor:
    """No change pulls the centre further than the median distance; ``hostile`` is not used."""
    return _fixed_point(gram, _clipping_step)


def _weiszfeld_step(distances: Tensor, floor: float) -> Tensor:
    weights = 1.0 / distances.clamp_min(floor)
    return weights / weights.sum()


def _clipping_step(centre: Tensor, distances: Tensor, radius: float) -> Tensor:
    """``v + mean_k a_k (D_k - v)`` with ``a_k = min(1, radius / |D_k - v|)``."""
    pulls = radius / distances.clamp_min(radius) / len(distances)
    return (1.0 - float(pulls.sum())) * centre + pulls


def _fixed_point(gram: Tensor, step: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    """Iterate coefficients from near the medoid; ``step`` gets the distances and their median."""
    _, inner = _from_medoid(gram)
    distances = _distances_to(inner, torch.zeros_like(inner[0]))
    coefficients = _weiszfeld_step(distances, max(float(distances.median()), 1e-300))
    for _ in range(STEPS):
        distances = _distances_to(inner, coefficients)
        radius = float(distances.median())
        if radius == 0.0:  # most changes are equal, and the centre is there
            return _indicator(distances == 0.0)
        last, coefficients = coefficients, step(coefficients, distances, radius)
        if float((coefficients - last).abs().max()) < CONVERGED:
            break
    return coefficients


def trimmed_mean(gram: Tensor, hostile: int) -> Tensor:
    """Each coordinate without its ``f`` smallest and largest values; f < n / 2.

    The axes are the principal ones of ``a_k d_k``: the changes less their medoid, none longer than
    the median. So no length that a hostile client chooses hides the others' axes in rounding, and
    what no axis resolves stays as in the medoid. With ``E diag(sqrt(v))`` the coordinates of the
    scaled rows and t the trimmed means of the unscaled ones, ``b = a E diag(1 / sqrt(v)) t`` are
    the coefficients of the d_k. They may be negative.
    """
    origin, inner = _from_medoid(gram)
    single = torch.zeros_like(gram[0])
    single[origin] = 1.0
    norms = inner.diagonal().clamp_min(0.0).sqrt()
    if not bool(norms.any()):
        return single
    scale = (norms[norms > 0].median() / norms.clamp_min(1e-300)).clamp_max(1.0)
    values, vectors = torch.linalg.eigh(scale[:, None] * inner * scale)
    alive = values > RESOLVED * float(values.max())
    axes, roots = vectors[:, alive], values[alive].sqrt()
    coordinates = (axes * roots / scale[:, None]).sort(dim=0).values
    means = coordinates[hostile : len(gram) - hostile].mean(dim=0)
    shares = scale * (axes @ (means / roots))
    return shares + (1.0 - float(shares.sum())) * single


def nearest_means(gram: Tensor, hostile: int) -> Tensor:
    """``M [n, n]``: row i has ``1 / (n - f)`` at the ``n - f`` changes nearest to change i.

    Each is nearest to itself; of equal distances the first ones count.
    """
    count = len(gram) - hostile
    distances = squared_distances(gram).fill_diagonal_(-1.0)
    nearest = distances.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(gram).scatter_(1, nearest, 1.0 / count)


def mixed(rule: Rule) -> Rule:
    """The rule over ``M D``, the means of nearest changes, as coefficients of the changes."""

    def coefficients(gram: Tensor, hostile: int) -> Tensor:
        means = nearest_means(gram, hostile)
        return means.T @ rule(means @ gram @ means.T, hostile)

    return coefficients


def _from_medoid(gram: Tensor) -> tuple[int, Tensor]:
    """The change with the smallest sum of distances, and the Gram matrix of the changes less it.

    Inner products of honest changes have then the rounding of their own size, not of a hostile one.
    """
    origin = int(squared_distances(gram).sqrt().sum(dim=1).argmin())
    return origin, gram - gram[origin] - gram[:, origin, None] + gram[origin, origin]


def _indicator(chosen: Tensor) -> Tensor:
    return chosen.double() / chosen.sum()


def _distances_to(gram: Tensor, coefficients: Tensor) -> Tensor:
    """``|D_k - v|`` with ``v = sum_j c_j D_j``, ``[n]``."""
    inner = gram @ coefficients
    squares = gram.diagonal() - 2.0 * inner + coefficients @ inner
    return squares.clamp_min(0.0).sqrt()


RULES: dict[str, Rule] = {
    "multi-krum": multi_krum,
    "geometric-median": geometric_median,
    "centred-clipping": centred_clipping,
    "nearest-trimmed-mean": mixed(trimmed_mean),
    "nearest-median": mixed(geometric_median),
}


@dataclass(frozen=True, kw_only=True)
class RobustMean:
    """A rule by its name in ``RULES``, and how many updates of a round may be hostile."""

    rule: str
    hostile: int

    @property
    def least(self) -> int:
        """The fewest updates for which the rule has a meaning: a majority, 2 f + 3 for Krum."""
        return 2 * self.hostile + (3 if self.rule == "multi-krum" else 1)

    def coefficients(self, gram: Tensor) -> Tensor:
        """``c [n]`` with ``n >= least``; sums to 1, and is 0 where only rounding is left."""
        coefficients = RULES[self.rule](gram, self.hostile)
        return torch.where(coefficients.abs() < ROUNDING, 0.0, coefficients)
