"""``basis``: the linear sum against dense float64, the shared rows, one client, late updates."""

import math
from dataclasses import replace

import pytest
import torch

import reference
from builders import random_adapter
from flexlora.aggregation import make_method
from flexlora.aggregation.engine.linear_update import (
    LinearSums,
    linear_norm,
    linear_update,
    scaled_columns,
)
from flexlora.algebra.linalg import orthonormal_rows
from flexlora.errors import UpdateRefused
from flexlora.lora.adapters import Adapter
from flexlora.seeds import generator
from one_round import SHAPES, OneRound, distance, next_state, same_bits


def basis_round(state=None, **options):
    return OneRound(make_method("basis", server_learning_rate=1.0), state, **options)


def widest(round_):
    return round_.sent["rank_7"].trained


# --- the rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(1, 5), (16, 40), (17, 40), (40, 40), (7, 7)])
def test_rows_are_orthonormal_and_a_longer_draw_begins_with_the_shorter_one(count, width):
    whole = orthonormal_rows(width, width, generator(3, "rows"))
    rows = orthonormal_rows(count, width, generator(3, "rows"))
    assert rows.shape == (count, width) and torch.equal(rows, whole[:count])
    identity = torch.eye(count, dtype=torch.float64)
    assert float((rows @ rows.T - identity).abs().max()) < 1e-14
    assert not torch.equal(rows, orthonormal_rows(count, width, generator(4, "rows")))


def test_rows_favour_no_direction():
    """The mean projector on uniformly random subspaces of dimension r is r / n times I."""
    draws = [orthonormal_rows(3, 6, generator(k, "rows")) for k in range(4000)]
    mean = sum(rows.T @ rows for rows in draws) / len(draws)
    assert float((mean - 0.5 * torch.eye(6, dtype=torch.float64)).abs().max()) < 0.03


@pytest.mark.parametrize("wire", ["float64", "float32", "bfloat16"])
def test_all_classes_are_sent_the_first_rows_of_one_basis_and_the_next_round_another(wire):
    state = next_state("basis", wire=wire)
    round_ = basis_round(state, wire=wire)
    for start in round_.sent.values():
        assert start.trainable == ("lora_B",)
        for name, factors in start.trained.items():
            whole = widest(round_)[name]
            assert torch.equal(factors.lora_A, whole.lora_A[: factors.rank])
            assert not factors.lora_B.any()
            step = factors.scaling * math.sqrt(factors.rank)  # of Adam, by rank
            assert step == pytest.approx(whole.scaling * math.sqrt(whole.rank), rel=1e-12)
    for name in SHAPES:
        before = widest(basis_round(wire=wire))[name].lora_A
        assert not torch.equal(before, widest(round_)[name].lora_A)
    other = basis_round(state, wire=wire, seed=1)
    assert not torch.equal(widest(other)["attn.q"].lora_A, widest(round_)["attn.q"].lora_A)


# --- the sum -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["float64", "bfloat16"])
def test_the_linear_sum_times_a_is_the_sum_of_the_dense_products(wire):
    """Also over a 16-bit wire, whose rows are orthonormal to three digits only."""
    round_ = basis_round(next_state("basis"), wire=wire)
    updates = [round_.update(k, 10 + 7 * k) for k in range(6)]
    total = sum(update.num_examples for update in updates)
    clients = [(update.adapter, update.num_examples) for update in updates]
    ranks = {name: factors.rank for name, factors in widest(round_).items()}
    for name in SHAPES:
        columns = sum(u.num_examples * linear_update(u.adapter, ranks)[name] for u in updates)
        product = columns / total @ widest(round_)[name].lora_A.double()
        dense = reference.flexlora_average(clients, name)
        assert reference.relative_error(product, dense) < 1e-13


def test_the_norm_of_the_linear_update_is_that_of_the_dense_change():
    round_ = basis_round()
    for k in range(3):
        adapter = round_.update(k).adapter
        dense = sum(float(reference.delta_weight(f).square().sum()) for f in adapter.values())
        assert linear_norm(adapter) == pytest.approx(math.sqrt(dense), rel=1e-12)
    trained = random_adapter(SHAPES, 3)  # rows that are not orthonormal
    dense = sum(float(reference.delta_weight(f).square().sum()) for f in trained.values())
    assert linear_norm(trained) != pytest.approx(math.sqrt(dense), rel=0.01)


def test_padding_adds_zero_columns_and_never_cuts():
    factors = random_adapter(SHAPES, 3)["attn.q"]
    padded = scaled_columns(factors, 5)
    assert padded.shape == (12, 5) and not padded[:, 3:].any()
    assert torch.equal(padded[:, :3], factors.scaling * factors.lora_B.double())
    with pytest.raises(ValueError, match="rank is 2, expected at least 3"):
        scaled_columns(factors, 2)


def test_the_memory_of_the_sum_is_one_matrix_a_module_whatever_the_number_of_clients():
    round_ = basis_round()
    sums = LinearSums()
    for k in range(30):
        sums.add(round_.update(k).adapter, 1.0)
    for name in SHAPES:
        assert sums.mean(name).rank_bound == widest(round_)[name].rank


def test_averaging_b_over_unequal_rows_would_be_another_matrix():
    """The control: with other rows for each client the mean of B says nothing."""
    adapters = [random_adapter(SHAPES, 4, seed=k) for k in range(3)]
    mean_B = sum(scaled_columns(adapter["attn.q"]) for adapter in adapters) / 3
    dense = reference.flexlora_average([(adapter, 1) for adapter in adapters], "attn.q")
    assert reference.relative_error(mean_B @ adapters[0]["attn.q"].lora_A, dense) > 0.3
    sums = LinearSums()
    for adapter in adapters:
        sums.add(adapter, 1.0)
    mean = sums.mean("attn.q")
    assert mean.rank_bound == 12 and reference.relative_error(mean.to_dense(), dense) < 1e-13


# --- the round ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_class", ["rank_2", "rank_7"])
def test_one_client_s_model_is_the_next_global_change(rank_class):
    round_ = basis_round(next_state("basis"))
    update = round_.update(0, 17, rank_class=rank_class)
    carried = round_.sent[rank_class].carried
    dense = {
        name: reference.delta_weight(carried[name]) + reference.delta_weight(factors)
        for name, factors in update.adapter.items()
    }
    assert distance(round_.finish([update]).change, dense) < 1e-12


def test_a_late_update_counts_with_the_rows_that_it_was_trained_on():
    first = basis_round()
    late = first.update(20, 9, rank_class="rank_3")
    late = replace(late, client_id="client_20@0", rank_class="late", late=True, discount=0.5)
    round_ = basis_round(next_state("basis"))
    round_.sent["late"] = first.sent["rank_3"]
    updates = [round_.update(k, 10 + k) for k in range(3)]
    result = round_.finish([*updates, late]).change
    weights = [(u.adapter, u.num_examples) for u in updates] + [(late.adapter, 4.5)]
    for name in SHAPES:
        dense = round_.state.change.delta_weight(name)
        dense = dense + reference.flexlora_average(weights, name)
        assert reference.relative_error(result.delta_weight(name), dense) < 1e-12


def test_an_update_that_trained_the_rows_is_refused_and_the_round_is_as_without_it():
    round_ = basis_round(next_state("basis"))
    good, bad = round_.update(0, 5), round_.update(1, 9)
    moved = {
        name: replace(factors, lora_A=factors.lora_A.roll(1, dims=0))
        for name, factors in bad.adapter.items()
    }
    opened = round_.open()
    opened.add(good)
    with pytest.raises(UpdateRefused, match=r"client_1, module 'attn.q': lora_A is not the one"):
        opened.add(replace(bad, adapter=Adapter(moved)))
    assert same_bits(opened.close(), round_.finish([good]))
