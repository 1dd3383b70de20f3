"""Aggregation methods by name, and ``aggregate`` for those who bring their own loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexlora.aggregation.aligned import Aligned
from flexlora.aggregation.carried import Carried
from flexlora.aggregation.engine.method import (
    Law,
    LocalPlan,
    Method,
    Start,
    State,
    Update,
    check_update,
)
from flexlora.aggregation.engine.server_step import ServerStep
from flexlora.aggregation.engine.state import GlobalChange
from flexlora.aggregation.fed_plora import FedPLoRA
from flexlora.aggregation.fedex_lora import FedExLoRA
from flexlora.aggregation.fedit import FedIT
from flexlora.aggregation.ffa_lora import FFALoRA
from flexlora.aggregation.flexlora import FlexLoRA
from flexlora.aggregation.flora import FLoRA
from flexlora.aggregation.florist import FLoRIST
from flexlora.aggregation.hetlora import HetLoRA
from flexlora.aggregation.raflora import RaFLoRA
from flexlora.aggregation.rbla import RBLA
from flexlora.aggregation.residual import Residual
from flexlora.aggregation.rolora import RoLoRA
from flexlora.aggregation.slora import SLoRA
from flexlora.errors import UpdateRefused, UserError, nearest
from flexlora.lora.adapters import Adapter

__all__ = [
    "METHODS",
    "GlobalChange",
    "Law",
    "LocalPlan",
    "Method",
    "MethodOptions",
    "Start",
    "State",
    "Update",
    "aggregate",
    "check_method",
    "check_options",
    "check_update",
    "make_method",
]


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """The ``method.*`` keys that a method may read; which ones it reads is in ``METHODS``.

    ``server_learning_rate`` 0 is the method's own.
    """

    server_learning_rate: float = 0.0
    server_optimizer: str = "sgd"
    server_momentum: float = 0.9
    max_rank: int = 1 << 30
    error_feedback: bool = False
    carried_rank: int = 64
    carried_dtype: str = ""
    gradient_batches: int = 1
    energy_threshold: float = 0.95
    prune_factor: float = 0.0
    prune_penalty: float = 0.0
    sparse_rounds: int = 2

    def step(self, learning_rate: float) -> ServerStep:
        """The server's step, at ``learning_rate`` where none was asked for."""
        return ServerStep(
            learning_rate=self.server_learning_rate or learning_rate,
            optimizer=self.server_optimizer,
            momentum=self.server_momentum,
            max_rank=self.max_rank,
            error_feedback=self.error_feedback,
        )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """How a method is made, and which options mean something to it."""

    make: Callable[[MethodOptions], Method]
    reads: frozenset[str] = frozenset()


STEP = frozenset(
    {"server_learning_rate", "server_optimizer", "server_momentum", "max_rank", "error_feedback"}
)
CARRIED = frozenset({"carried_rank", "carried_dtype", "gradient_batches"})

METHODS: dict[str, Entry] = {
    "aligned": Entry(
        make=lambda o: Aligned(
            step=o.step(2.0),
            carried_rank=o.carried_rank,
            carried_dtype=o.carried_dtype,
            gradient_batches=o.gradient_batches,
        ),
        reads=STEP | CARRIED,
    ),
    "carried": Entry(
        make=lambda o: Carried(
            step=o.step(2.0),
            carried_rank=o.carried_rank,
            carried_dtype=o.carried_dtype,
        ),
        reads=STEP | {"carried_rank", "carried_dtype"},
    ),
    "fed-plora": Entry(
        make=lambda o: FedPLoRA(num_terms=o.carried_rank), reads=frozenset({"carried_rank"})
    ),
    "fedex-lora": Entry(make=lambda o: FedExLoRA(step=o.step(1.0)), reads=STEP),
    "fedit": Entry(make=lambda o: FedIT()),
    "ffa-lora": Entry(make=lambda o: FFALoRA()),
    "flexlora": Entry(make=lambda o: FlexLoRA(step=o.step(1.0)), reads=STEP),
    "flora": Entry(make=lambda o: FLoRA(step=o.step(1.0)), reads=STEP),
    "florist": Entry(
        make=lambda o: FLoRIST(step=o.step(1.0), energy_threshold=o.energy_threshold),
        reads=STEP | {"energy_threshold"},
    ),
    "hetlora": Entry(
        make=lambda o: HetLoRA(prune_factor=o.prune_factor, prune_penalty=o.prune_penalty),
        reads=frozenset({"prune_factor", "prune_penalty"}),
    ),
    "raflora": Entry(make=lambda o: RaFLoRA(step=o.step(1.0)), reads=STEP),
    "rbla": Entry(make=lambda o: RBLA()),
    "residual": Entry(make=lambda o: Residual(step=o.step(2.0)), reads=STEP),
    "rolora": Entry(make=lambda o: RoLoRA()),
    "slora": Entry(
        make=lambda o: SLoRA(sparse_rounds=o.sparse_rounds), reads=frozenset({"sparse_rounds"})
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
    return METHODS[name].make(MethodOptions(**options))


def check_options(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse an option that was changed and that the method does not read.

    Raises:
        UserError: it would otherwise be ignored without a word.
    """
    check_method(name)
    for option, value in given.items():
        if value != defaults[option] and option not in METHODS[name].reads:
            readers = ", ".join(k for k, entry in METHODS.items() if option in entry.reads)
            key = "method." + option.replace("_", "-").replace("max-rank", "server-max-rank")
            raise UserError(
                f"{key} is {value}, which method.name={name} does not read (but {readers} do); "
                f"leave it at {defaults[option]}."
            )


def aggregate(updates: Sequence[tuple[Adapter, int]], method: str = "flexlora") -> GlobalChange:
    """One round from ``G = 0`` over ``(adapter, num_examples)`` pairs of any ranks and alphas.

    The result is in the dtype of the first adapter; ``G = sum_k p_k s_k B_k A_k`` for ``flexlora``
    and ``residual``.

    Raises:
        UserError: an unknown method.
        UpdateRefused: no updates, unequal module sets or shapes, NaN, or examples that are not
            positive.
    """
    if not updates:
        raise UpdateRefused("there is no update to aggregate, expected at least one.")
    first = updates[0][0]
    shapes = {name: (f.out_features, f.in_features) for name, f in first.items()}
    dtype = next(iter(first.values())).lora_A.dtype
    state = State(round=0, change=GlobalChange.zero(shapes, dtype))
    opened = make_method(method, server_learning_rate=1.0).begin(state, sent={})
    for index, (adapter, num_examples) in enumerate(updates):
        update = Update(client_id=f"{index:09d}", adapter=adapter, num_examples=num_examples)
        check_update(update, _like(adapter, first, update.client_id))
        opened.add(update)
    return opened.finish().change


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
