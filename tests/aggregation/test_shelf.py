"""Sums that do not fit lie on disk: the same bits; the file is small and has no name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

from builders import random_adapter
from flexlora.aggregation.engine.product_sums import ProductSums
from flexlora.aggregation.engine.spill import Shelf, Shelved
from flexlora.algebra.decompose import LazySums, MatrixSum

SHAPES = {"tall": (40, 12), "wide": (12, 40), "square": (24, 24)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 4), (7,)])
def test_what_is_put_is_what_is_read(dtype, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    shelf = Shelf(0)
    kept = shelf.put(tensor)
    assert isinstance(kept, Shelved) == (tensor.nbytes > 0)
    back = shelf.read(kept)
    assert torch.equal(back, tensor) and back.dtype == dtype and back.data_ptr() % 64 == 0


def test_transposed_tensors_are_put_by_their_numbers():
    tensor, shelf = torch.arange(12.0).reshape(3, 4).T, Shelf(0)
    assert torch.equal(shelf.read(shelf.put(tensor)), tensor)


def test_memory_is_used_first_and_again_after_it_was_given_up():
    shelf = Shelf(100)
    first, second = torch.zeros(20), torch.ones(20)
    assert shelf.put(first) is first
    kept = shelf.put(second)
    assert isinstance(kept, Shelved)
    shelf.forget(first)
    assert shelf.put(second) is second
    shelf.forget(kept)
    again = shelf.put(torch.full((20,), 2.0))
    assert again.at == kept.at and torch.equal(shelf.read(again), torch.full((20,), 2.0))


def test_the_file_has_no_name_and_ends_with_the_shelf(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shelf = Shelf(0)
    shelf.put(torch.zeros(1000))
    handle = shelf._file
    assert not list(Path(tmp_path).iterdir()) and os.fstat(handle).st_size == 4000
    del shelf
    with pytest.raises(OSError):
        os.fstat(handle)


def filled(held_bytes, clients=9):
    sums = ProductSums(SHAPES, held_bytes=held_bytes)
    for k in range(clients):
        sums.add(random_adapter(SHAPES, 3, seed=k), 10 + k)
    return sums


@pytest.mark.parametrize("held_bytes", [0, 500, 1500])
@pytest.mark.parametrize("clients", [1, 3, 9, 200])
def test_sums_have_the_same_bits_wherever_they_lie(held_bytes, clients):
    """From factors alone to a dense matrix that was folded more than once."""
    small, large = filled(held_bytes, clients), filled(1 << 30, clients)
    assert large._shelf._file is None and small._shelf._used <= held_bytes
    assert small._shelf._file is not None
    for name, (_, n) in SHAPES.items():
        probes = torch.eye(n, dtype=torch.float64)
        assert torch.equal(small.mean(name).apply(probes), large.mean(name).apply(probes))
        for _ in range(2):  # a mean may be asked for again
            assert torch.equal(small.mean(name).to_dense(), large.mean(name).to_dense())
    small.clear()
    for name in SHAPES:
        assert small.mean(name).rank_bound == 0 and small.mean(name).dense is None


def test_the_file_does_not_grow_with_what_was_folded():
    """A dense matrix is written over and over; what is folded gives its place up."""
    sizes = []
    for clients in (400, 1200):
        sums = filled(0, clients)
        sizes.append(os.fstat(sums._shelf._file).st_size)
    assert sizes[1] <= sizes[0] * 1.01


def test_a_cleared_sum_holds_nothing():
    sums = filled(2000)
    sums.clear()
    assert sums._shelf._used == 0 and not any(sums._terms.values()) and not sums._dense


def test_lazy_sums_are_made_when_asked_for():
    made = []

    def make(name):
        made.append(name)
        return MatrixSum(shape=(2, 3))

    sums = LazySums(["b", "a"], make)
    assert list(sums) == ["b", "a"] and len(sums) == 2 and made == []
    assert sums["a"].shape == (2, 3) and made == ["a"]
    with pytest.raises(KeyError):
        sums["c"]
