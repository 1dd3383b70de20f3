"""Aggregation methods by name, and ``aggregate`` for those who bring their own loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flexlora.adapters import Adapter
from flexlora.aggregation.aligned import Aligned
from flexlora.aggregation.base import Law, Method, Start, State, Update, check_update
from flexlora.aggregation.fedit import FedIT
from flexlora.aggregation.flexlora import FlexLoRA
from flexlora.aggregation.residual import Residual
from flexlora.aggregation.state import GlobalChange
from flexlora.errors import UpdateRefused, UserError, nearest

__all__ = [
    "METHODS",
    "GlobalChange",
    "Law",
    "Method",
    "MethodOptions",
    "Start",
    "State",
    "Update",
    "aggregate",
    "check_method",
    "check_update",
    "make_method",
]


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """The ``method.*`` keys; each method reads those that mean something to it."""

    server_learning_rate: float = 1.0
    max_rank: int = 1 << 30
    carried_rank: int = 64
    gradient_batches: int = 1


METHODS: dict[str, Callable[[MethodOptions], Method]] = {
    "aligned": lambda o: Aligned(
        server_learning_rate=o.server_learning_rate,
        max_rank=o.max_rank,
        carried_rank=o.carried_rank,
        gradient_batches=o.gradient_batches,
    ),
    "fedit": lambda o: FedIT(),
    "flexlora": lambda o: FlexLoRA(max_rank=o.max_rank),
    "residual": lambda o: Residual(
        server_learning_rate=o.server_learning_rate, max_rank=o.max_rank
    ),
}


def check_method(name: str) -> None:
    """Raises ``UserError`` with the known names for a method that does not exist."""
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise UserError(f"method '{name}' is unknown, expected {known}.{nearest(name, METHODS)}")


def make_method(name: str, **options: Any) -> Method:
    """The method of that name with ``MethodOptions``, ready for its first ``begin``.

    Raises:
        UserError: an unknown name; there is no default branch.
    """
    check_method(name)
    return METHODS[name](MethodOptions(**options))


def aggregate(updates: Sequence[tuple[Adapter, int]], method: str = "flexlora") -> GlobalChange:
    """One round from ``G = 0`` over ``(adapter, num_examples)`` pairs of any ranks and alphas.

    The result is in the dtype of the first adapter; ``G = sum_k p_k s_k B_k A_k`` for ``flexlora``
    and ``residual``.

    Raises:
        UserError: an unknown method.
        UpdateRefused: no updates, unequal module sets or shapes, NaN, or examples that are not
            positive.
    """
    engine = make_method(method)
    if not updates:
        raise UpdateRefused("there is no update to aggregate, expected at least one.")
    first = updates[0][0]
    shapes = {name: (f.out_features, f.in_features) for name, f in first.items()}
    dtype = next(iter(first.values())).lora_A.dtype
    engine.begin(State(round=0, change=GlobalChange.zero(shapes, dtype)), sent={})
    for index, (adapter, num_examples) in enumerate(updates):
        update = Update(client_id=f"{index:09d}", adapter=adapter, num_examples=num_examples)
        check_update(update, _like(adapter, first, update.client_id))
        engine.add(update)
    return engine.finish().change


def _like(adapter: Adapter, first: Adapter, client_id: str) -> Adapter:
    """What ``check_update`` may hold this adapter to: its own ranks, the first one's in and out."""
    expected = {}
    for name, factors in first.items():
        own = adapter.get(name, factors)
        shapes = (factors.out_features, factors.in_features), (own.out_features, own.in_features)
        if shapes[0] != shapes[1]:
            raise UpdateRefused(
                f"client {client_id}, module '{name}': [out, in] is {list(shapes[1])}, "
                f"expected {list(shapes[0])} as in the first update."
            )
        expected[name] = own
    return Adapter(expected)
