"""A bound on the share of a round's weight that one update may have.

    p_k <= c(K) = 2 / (1 + sqrt(K))        K updates of positive weight

    K      1     2     3     4     8    24   100  1000
    c      1  0.83  0.73  0.67  0.52  0.34  0.18  0.06

The number of examples is what a client says, and it may say anything. An update beyond the bound
counts with exactly the share ``c(K)``; the weights of the others are as they were. In numbers, with
the level ``L`` that solves ``L = c sum_k min(w_k, L)``, each weight becomes ``min(w_k, L)``: a
function of the set of updates, whatever the order in which they come. How rarely it touches honest
clients of unequal sizes is in ``docs/log.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["largest_share", "weight_level"]


def largest_share(count: int) -> float:
    """``c(K)``: the share that one of ``count`` updates may have."""
    return 2.0 / (1.0 + math.sqrt(count))


def weight_level(weights: Sequence[float], share: float | None = None) -> float:
    """``L``; not below the largest weight where none has more than its share.

    ``share`` is that of the number of positive weights, unless more updates may still come: the
    level of those that are in, at the smaller share of all, is never above the final one.
    """
    ordered = sorted((weight for weight in weights if weight > 0.0), reverse=True)
    if share is None:
        share = largest_share(len(ordered))
    for capped in range(len(ordered)):
        rest = 1.0 - share * capped
        if rest <= 0.0:
            break
        level = share * math.fsum(ordered[capped:]) / rest
        if ordered[capped] <= level:
            return level
    return 0.0
