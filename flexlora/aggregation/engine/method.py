"""The interface of an aggregation method: what it declares, what it computes.

A method is one class in one file. It holds its options and nothing of any round. ``start`` builds
what a rank class is sent; the engine (``open_round.py``) collects the updates and accumulates the
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

    They are those of the method's rule: of the sgd step, without a cap on the rank of ``G``.
    """

    ORDER = "the order of the clients does not matter"
    SCALE_OF_WEIGHTS = "multiplying all num_examples by a constant does not matter"
    ONE_CLIENT = "one client at any rank reproduces its own delta_weight"
    ZERO_TRAINING = "a round in which nobody trained changes nothing"
    AVERAGE_OF_PRODUCTS = (
        "from G = 0 the change is the weighted sum of the products, times the server's rate"
    )


class Method(Protocol):
    """One aggregation method; its file names the paper and shows its equation.

    Attributes:
        laws: the laws of ``Law`` that it keeps.
        needs: the sums that ``close`` reads, and the weight of an update in them.
        wire_space: where an int8 wire may feed back its rounding: into the ``products`` or the
            ``factors``, whose changes the method adds up; "" where it averages whole factors or
            products, so that rounding would enter ``G`` in every round.
        Options: a pydantic model of the keys ``method.*`` that this method has.
    """

    name: str
    laws: frozenset[str]
    needs: Needs
    wire_space: str
    Options: ClassVar[type[MethodOptions]]

    def __init__(self, options: Any) -> None: ...

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        """What ``rank_class`` is sent in the round after ``state``."""

    def close(self, state: State, sums: Sums) -> State:
        """The state after a round with these sums; called only if at least one update came."""
