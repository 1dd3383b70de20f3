"""FedIT: the mean of the factors, which is not the mean of the products."""

import pytest
import reference
import torch
from builders import random_adapter

from flexlora.aggregation import GlobalChange, State, Update, aggregate, make_method
from flexlora.aggregation.base import Factoring
from flexlora.ranks import RankClass

SHAPES = {"attn.q": (10, 12), "mlp.up": (14, 9)}
FACTORING = Factoring(alpha=8.0, seed=3)


@pytest.fixture
def clients():
    ranks, alphas, examples = (2, 5, 3), (4.0, 16.0, 9.0), (10, 30, 25)
    return [
        (random_adapter(SHAPES, rank, alpha=alpha, seed=k, rslora=k == 2), count)
        for k, (rank, alpha, count) in enumerate(zip(ranks, alphas, examples, strict=True))
    ]


def one_round(clients):
    method = make_method("fedit")
    method.begin(State(round=0, change=GlobalChange.zero(SHAPES, torch.float64)), {})
    for k, (adapter, count) in enumerate(clients):
        method.add(Update(client_id=f"client_{k}", adapter=adapter, num_examples=count))
    return method, method.finish()


def test_the_product_of_the_padded_means_is_what_the_state_holds(clients):
    _, state = one_round(clients)
    for name in SHAPES:
        mean_A, mean_B = reference.zero_padded_factors(clients, name, rank=5)
        assert reference.relative_error(state.change.delta_weight(name), mean_B @ mean_A) < 1e-12


def test_averaging_factors_is_not_averaging_products(clients):
    """Trap T2, the negative control: with one client the two agree, with three they do not."""
    _, state = one_round(clients)
    products = aggregate(clients, method="flexlora")
    alone = aggregate(clients[:1], method="fedit")
    for name in SHAPES:
        gap = reference.relative_error(state.change.delta_weight(name), products.delta_weight(name))
        assert gap > 0.1
        own = clients[0][0].delta_weight(name)
        assert reference.relative_error(alone.delta_weight(name), own) < 1e-12


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_client_is_sent_the_first_rows_and_columns(clients, rank):
    method, state = one_round(clients)
    start = method.start(state, RankClass(name="c", rank=rank), FACTORING)
    for name in SHAPES:
        mean_A, mean_B = reference.zero_padded_factors(clients, name, rank=5)
        sent = start.trained[name].delta_weight()
        assert reference.relative_error(sent, mean_B[:, :rank] @ mean_A[:rank]) < 1e-12


def test_rows_that_nobody_has_yet_start_live_and_round_one_is_nested(clients):
    method, state = one_round(clients)
    wide = method.start(state, RankClass(name="c", rank=8), FACTORING).trained["attn.q"]
    assert bool((wide.lora_A[5:].abs().sum(dim=1) > 0).all()) and not wide.lora_B[:, 5:].any()
    zero = State(round=0, change=GlobalChange.zero(SHAPES, torch.float64))
    small, large = (
        method.start(zero, RankClass(name="c", rank=rank), FACTORING).trained["mlp.up"]
        for rank in (2, 6)
    )
    assert torch.equal(small.lora_A, large.lora_A[:2]) and not large.lora_B.any()


def test_the_same_clients_in_another_order_give_the_same_bits(clients):
    method = make_method("fedit")
    method.begin(State(round=0, change=GlobalChange.zero(SHAPES, torch.float64)), {})
    for k in (2, 0, 1):
        adapter, count = clients[k]
        method.add(Update(client_id=f"client_{k}", adapter=adapter, num_examples=count))
    other, (_, state) = method.finish(), one_round(clients)
    for name in SHAPES:
        assert torch.equal(other.change.delta_weight(name), state.change.delta_weight(name))
