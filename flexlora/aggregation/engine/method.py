"""The interface of an aggregation method: what it declares, what it computes.

A method is one class in one file, without state beyond its options. ``start`` builds the payload
of a rank class; the engine (``open_round.py``) collects the updates and accumulates the
sums that ``needs`` names; ``close`` turns them into the next state. Both are pure functions.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from flexlora.aggregation.engine.options import MethodOptions
from flexlora.aggregation.engine.starts import Factoring, Start
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.lora.ranks import RankClass

__all__ = ["Law", "Method"]


class Law:
    """The laws that a method may declare; ``tests/laws`` checks exactly the declared ones.

    They hold for the sgd step, without a cap on the rank of ``G``.
    """

    ORDER = "the order of the clients does not matter"
    SCALE_OF_WEIGHTS = "multiplying all num_examples by a constant does not matter"
    ONE_CLIENT = "one client at any rank reproduces its own delta_weight"
    ZERO_TRAINING = "a round without training changes nothing"
    AVERAGE_OF_PRODUCTS = (
        "from G = 0 the change is the weighted sum of the products, times the server's rate"
    )


class Method(Protocol):
    """One aggregation method; its file names the paper and shows its equation.

    Attributes:
        laws: the laws of ``Law`` that the method obeys.
        needs: the sums that ``close`` reads, and the weight of an update in them.
        wire_space: in which space int8 rounding errors are fed back: ``products`` or ``factors``,
            if the method adds up their changes; "" if it averages whole factors or products, so
            that rounding would enter ``G`` in every round.
        Options: the method's keys ``method.*``.
    """

    name: str
    laws: frozenset[str]
    needs: Needs
    wire_space: str
    Options: ClassVar[type[MethodOptions]]

    def __init__(self, options: Any) -> None: ...

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        """The payload for ``rank_class`` in the round after ``state``."""

    def close(self, state: State, sums: Sums) -> State:
        """The state after a round with these sums, of at least one update."""
