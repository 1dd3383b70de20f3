"""Adapters as rows of one matrix per module."""

import pytest
import torch

from builders import random_adapter
from flexlora.lora.adapters import Adapter
from flexlora.lora.layouts import laid_out
from flexlora.serving.rank_arena import RankArena, prepared, row_bytes

F64 = torch.float64


@pytest.fixture
def arena(shapes):
    return RankArena(shapes, max_rows=20, dtype=F64, device=torch.device("cpu"))


def product(arena, key, name):
    rows = arena[key]
    A, B = arena.A[name][rows.start : rows.stop], arena.B[name][rows.start : rows.stop]
    return B.T @ A


def check(arena, adapters):
    """Every module's product in the arena is the adapter's, the scaling included."""
    for key, adapter in adapters.items():
        for name, (out, width) in arena.shapes.items():
            expected = torch.zeros(out, width, dtype=F64)
            if name in adapter:
                expected = adapter.delta_weight(name)
            torch.testing.assert_close(product(arena, key, name), expected)


def test_products_are_the_adapters_whatever_their_ranks_modules_and_scalings(arena, shapes):
    some = {name: shape for name, shape in shapes.items() if name != "attn.v"}
    adapters = {
        "equal": random_adapter(shapes, 3, alpha=7.0, seed=1),
        "unequal": random_adapter(shapes, [1, 5, 2], alpha=[2.0, 9.0], rslora=True, seed=2),
        "some": random_adapter(some, 4, seed=3),
    }
    for key, adapter in adapters.items():
        arena.place(key, adapter)
    check(arena, adapters)
    assert arena.used_rows == 3 + 5 + 4, "an adapter has as many rows as the largest rank in it"
    assert arena.users == {"attn.q": 3, "attn.v": 2, "mlp.up": 3}
    arena.remove("some")
    assert arena.users["attn.q"] == 2


def test_freed_rows_are_used_again_and_adapters_move_together_where_they_are_scattered(
    arena, shapes
):
    adapters = {k: random_adapter(shapes, 4, seed=k) for k in range(5)}
    for key, adapter in adapters.items():
        arena.place(key, adapter)
    for key in (0, 2):
        arena.remove(key)
        del adapters[key]
    adapters["small"] = random_adapter(shapes, 3, seed=9)
    arena.place("small", adapters["small"])
    assert (arena[1].start, arena["small"].start) == (4, 0), "the first gap, nothing moves"
    adapters["large"] = random_adapter(shapes, 5, seed=10)
    arena.place("large", adapters["large"])
    check(arena, adapters)
    assert arena.used_rows == arena.capacity == 20
    assert not arena.fits(1)
    with pytest.raises(ValueError, match="1 rows do not fit: 20 of 20 in use"):
        arena.place("more", random_adapter(shapes, 1))


def test_memory_grows_with_the_rows_in_use(shapes):
    arena = RankArena(shapes, max_rows=10_000, dtype=F64, device=torch.device("cpu"))
    assert sum(matrix.nbytes for matrix in arena.A.values()) == 0
    for k in range(100):
        arena.place(k, random_adapter(shapes, 2, seed=k))
    held = sum(m.nbytes for m in (*arena.A.values(), *arena.B.values()))
    assert held == arena.capacity * row_bytes(shapes, F64)
    assert arena.capacity < 2 * 200 + 64


def test_zero_terms_are_left_out_and_the_products_stay(shapes):
    """The padding of the portable layout, which an adapter of unequal ranks is exported in."""
    adapter = random_adapter(shapes, [2, 6, 1], alpha=[3.0, 8.0], seed=4)
    kept = prepared(laid_out(adapter, "portable"), F64)
    assert [f.rank for f in kept.values()] == [f.rank for f in adapter.values()]
    for name in shapes:
        torch.testing.assert_close(kept.delta_weight(name), adapter.delta_weight(name))


@pytest.mark.parametrize("rslora", [False, True])
def test_terms_between_others_are_left_out_too(shapes, rslora):
    adapter = random_adapter(shapes, 4, rslora=rslora, seed=5)
    for factors in adapter.values():
        factors.lora_A[1] = 0
        factors.lora_B[:, 2] = 0
    kept = prepared(adapter, F64)
    assert {f.rank for f in kept.values()} == {2}
    for name in shapes:
        torch.testing.assert_close(kept.delta_weight(name), adapter.delta_weight(name))


def test_an_adapter_of_zeros_keeps_one_term(shapes):
    zero = Adapter({n: f.map(torch.zeros_like) for n, f in random_adapter(shapes, 3).items()})
    assert {f.rank for f in prepared(zero, F64).values()} == {1}
