"""One round of a method over adapters in memory, for callers with their own training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from flexlora.aggregation import make_method, method_class, method_options
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.options import UNCAPPED
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update, check_update
from flexlora.algebra.linalg import sum_dtype
from flexlora.errors import UpdateRefused
from flexlora.lora.adapters import Adapter

__all__ = ["aggregate"]


def aggregate(updates: Sequence[tuple[Adapter, int]], method: str = "flexlora") -> GlobalChange:
    """One round from ``G = 0`` over ``(adapter, num_examples)`` pairs of any ranks and alphas.

    ``G = sum_k p_k s_k B_k A_k`` for ``flexlora`` and ``residual``. It is float64 where any factor
    is and float32 elsewhere, half precision included: an adapter in bfloat16 does not cost the
    others their tail. It is computed and stays where the first adapter's factors are; those of
    others may be on other devices.

    Raises:
        UserError: an unknown method.
        UpdateRefused: no updates, unequal module sets or shapes, NaN, or examples that are not
            positive.
    """
    if not updates:
        raise UpdateRefused("there is no update to aggregate, expected at least one.")
    first = updates[0][0]
    shapes = {name: (f.out_features, f.in_features) for name, f in first.items()}
    dtype = sum_dtype(tensor.dtype for adapter, _ in updates for tensor in _tensors(adapter))
    device = next(_tensors(first)).device
    state = State(round=0, change=GlobalChange.zero(shapes, dtype, device))
    exact = {"server_learning_rate": 1.0, "server_max_rank": UNCAPPED}
    known = method_class(method).Options.model_fields
    options = method_options(method, {name: exact[name] for name in exact if name in known})
    opened = OpenRound(make_method(method, options), state, sent={})
    for index, (adapter, num_examples) in enumerate(updates):
        moved = adapter.to(device, dtype)
        update = Update(client_id=f"{index:09d}", adapter=moved, num_examples=num_examples)
        check_update(update, _like(moved, first, update.client_id))
        opened.add(update)
    return opened.close().change


def _tensors(adapter: Adapter) -> Iterator[Tensor]:
    return (tensor for factors in adapter.values() for tensor in (factors.lora_A, factors.lora_B))


def _like(adapter: Adapter, first: Adapter, client_id: str) -> Adapter:
    """``adapter`` at its own ranks, for ``check_update``; in and out features as in ``first``.

    Raises:
        UpdateRefused: a module of another shape than in the first update.
    """
    expected = {}
    for name, reference in first.items():
        factors = adapter.get(name, reference)
        shape = [factors.out_features, factors.in_features]
        wanted = [reference.out_features, reference.in_features]
        if shape != wanted:
            raise UpdateRefused(
                f"client {client_id}, module '{name}': [out, in] is {shape}, "
                f"expected {wanted} as in the first update."
            )
        expected[name] = factors
    return Adapter(expected)
