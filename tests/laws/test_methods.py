"""Aggregation methods keep exactly the laws they declare, and equal the dense reference."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from builders import random_adapter, random_factors
from flexlora import Adapter, aggregate
from flexlora.aggregation import METHODS, make_method
from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs
from flexlora.errors import UserError
from flexlora.lora.ranks import RankClass
from law_checks import CHECKS, LAWS, VARIANTS, check_zero_training, variant
from one_round import (
    SHAPES,
    OneRound,
    distance,
    global_change,
    next_state,
    same_bits,
)


def from_change(change, server_round=3):
    return State(round=server_round, change=change)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("label", VARIANTS)
def test_a_method_keeps_the_laws_it_declares_and_breaks_the_others(label, law):
    """The second half shows that checks can fail; a method that keeps a law declares it."""
    method = variant(label)
    if law in method.laws:
        CHECKS[law](method)
    else:
        with pytest.raises(AssertionError):
            CHECKS[law](method)


def test_the_check_of_order_sees_an_engine_that_adds_as_updates_arrive(monkeypatch):
    arrivals = itertools.count()
    monkeypatch.setattr(OpenRound, "_place", lambda *_: (False, 0, f"{next(arrivals):09d}"))
    with pytest.raises(AssertionError):
        CHECKS[Law.ORDER](make_method("flexlora"))


def test_the_check_of_the_weights_sees_a_weight_that_is_no_share():
    method = make_method("flexlora")
    method.needs = Needs(products=True, weight=lambda update: math.isqrt(update.num_examples))
    with pytest.raises(AssertionError):
        CHECKS[Law.SCALE_OF_WEIGHTS](method)
    CHECKS[Law.ORDER](method)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_answers_to_its_name_and_declares_known_laws(name):
    method = make_method(name)
    assert method.name == name
    assert method.laws <= set(LAWS) and method.laws


ADDS_CHANGES = (
    "aligned",
    "basis",
    "carried",
    "carried few",
    "fedex-lora",
    "ffa-lora",
    "flexlora feedback",
    "flora",
    "florist",
    "raflora feedback",
    "residual",
    "rolora",
)


@pytest.mark.parametrize("label", sorted({*ADDS_CHANGES, "rbla", "fed-plora"}))
def test_over_a_16_bit_wire_only_methods_that_add_changes_keep_what_nobody_trained(label):
    """What is subtracted is the decoded start; a mean of decoded factors takes the rounding in."""
    method = variant(label)
    state = next_state(method, wire="bfloat16")
    round_ = OneRound(method, state, wire="bfloat16")
    result = round_.finish([round_.update(k, 10 + k, trained=False) for k in range(5)])
    moved = distance(result.change, state.change)
    assert moved < 1e-12 if label in ADDS_CHANGES else 1e-4 < moved < 1e-2


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.floats(0.5, 64), st.booleans(), st.integers(1, 10**5)),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_aggregate_equals_the_dense_average_at_any_ranks_alphas_and_scalings(specs, seed):
    """Traps T1 and T3: unequal scalings, and every client counts by its share."""
    clients = [
        (random_adapter(SHAPES, rank, alpha=alpha, rslora=rslora, seed=seed % 1000 + k), n)
        for k, (rank, alpha, rslora, n) in enumerate(specs)
    ]
    dense = {module: reference.flexlora_average(clients, module) for module in SHAPES}
    for method in ("flexlora", "residual", "flora", "fedex-lora", "aligned"):
        assert distance(aggregate(clients, method=method), dense) < 1e-12


def test_every_client_counts():
    """Trap T3: leaving out any one of them moves the result."""
    clients = [(random_adapter(SHAPES, 2 + k, seed=k), 10) for k in range(4)]
    whole = aggregate(clients)
    for k in range(4):
        assert distance(aggregate(clients[:k] + clients[k + 1 :]), whole) > 0.1


def test_a_client_that_failed_is_in_no_denominator():
    """Trap T6: two of three replies weigh 1/4 and 3/4, whatever the third would have had."""
    round_ = OneRound("flexlora", from_change(global_change()))
    updates = [round_.update(k, n) for k, n in enumerate((10, 30, 1000))]
    result = round_.finish(updates[:2]).change
    dense = {
        n: 0.25 * reference.delta_weight(updates[0].adapter[n])
        + 0.75 * reference.delta_weight(updates[1].adapter[n])
        for n in SHAPES
    }
    assert distance(result, dense) < 1e-12


@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("wire", ["float64", "bfloat16"])
def test_residual_equals_its_equation_with_the_decoded_starts(eta, wire):
    change = global_change()
    method = make_method("residual", server_learning_rate=eta)
    round_ = OneRound(method, from_change(change), wire=wire, rslora=True)
    updates = [round_.update(k, 10 + 9 * k) for k in range(5)]
    result = round_.finish(updates).change
    clients = [(update.adapter, update.num_examples) for update in updates]
    starts = [round_.sent[update.rank_class].trained for update in updates]
    dense = {
        n: reference.residual_form(change.delta_weight(n), clients, starts, n, eta) for n in SHAPES
    }
    assert distance(result, dense) < 1e-12


def test_a_16_bit_start_differs_from_the_truncation_so_it_must_be_what_is_subtracted():
    """The control of the bfloat16 case above: subtracting T_r(G) itself would be far off."""
    change = global_change()
    start = OneRound("residual", from_change(change), wire="bfloat16").sent["rank_3"].trained
    truncated = reference.truncate(change.delta_weight("attn.q"), 3)
    error = reference.relative_error(reference.delta_weight(start["attn.q"]), truncated)
    assert 1e-4 < error < 1e-2


@pytest.mark.parametrize("wire", ["float64", "float32", "bfloat16"])
def test_rounds_without_training_do_not_grow_the_rank_of_the_residual(wire):
    """Rounding noise must not become directions that are stored and sent."""
    change = global_change(dtype=torch.float64 if wire == "float64" else torch.float32)
    for _ in range(3):
        round_ = OneRound("residual", from_change(change), wire=wire, alpha=7.0)
        updates = [round_.update(k, 10 + k, trained=False) for k in range(5)]
        change = round_.finish(updates).change
    assert {name: svd.rank for name, svd in change.items()} == dict.fromkeys(SHAPES, 5)


def collapse(method, rounds):
    """Singular values of G by round when 8 clients of rank 8 and 2 of rank 24 do not train."""
    change = global_change(24, shapes={"w": (40, 30)})
    classes = (RankClass(name="rank_8", rank=8), RankClass(name="rank_24", rank=24))
    values = [change["w"].S.clone()]
    for _ in range(rounds):
        round_ = OneRound(method, from_change(change), classes=classes)
        updates = [
            round_.update(k, 1, rank_class="rank_8" if k < 8 else "rank_24", trained=False)
            for k in range(10)
        ]
        change = round_.finish(updates).change
        values.append(change["w"].S)
    return values


def test_flexlora_shrinks_each_direction_by_the_share_of_clients_that_hold_it():
    """Trap T10, rank collapse: sigma_j keeps c_j = sum of p_k over r_k >= j, every round."""
    values = collapse("flexlora", 3)
    held = torch.tensor([1.0] * 8 + [0.2] * 16, dtype=torch.float64)
    for t in (1, 2, 3):
        torch.testing.assert_close(values[t], values[0] * held**t, rtol=1e-9, atol=0)
    assert float(values[3][19] / values[0][19]) == pytest.approx(0.008, rel=1e-9)


@pytest.mark.parametrize("label", ["residual", "flexlora feedback", "raflora", "raflora feedback"])
def test_others_keep_every_direction_where_flexlora_loses_it(label):
    values = collapse(variant(label), 3)
    torch.testing.assert_close(values[3], values[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["residual", "flora", "flexlora", "fedex-lora", "raflora"])
def test_under_a_cap_error_feedback_keeps_what_nobody_trained(name):
    """What the cap dropped comes back and is dropped again; Eckart-Young keeps the top."""
    method = make_method(name, server_max_rank=4, error_feedback=True)
    trained = next_state(method)
    assert trained.dropped_energy > 0.01
    check_zero_training(method)


@pytest.mark.parametrize("label", ["flexlora", "flexlora feedback", "raflora", "residual"])
def test_what_a_weak_class_is_sent_is_the_truncation_of_what_a_strong_one_is(label):
    method = variant(label)
    sent = OneRound(method, next_state(method)).sent
    for name in SHAPES:
        strong = reference.delta_weight(sent["rank_7"].trained[name])
        for rank in (2, 3):
            weak = reference.delta_weight(sent[f"rank_{rank}"].trained[name])
            assert reference.relative_error(weak, reference.truncate(strong, rank)) < 1e-10


def test_averaging_factors_is_not_averaging_products():
    """Trap T2, the negative control: mean(B) mean(A) is another matrix than mean(B A)."""
    clients = [(random_adapter(SHAPES, 4, seed=k), 10) for k in range(3)]
    ours = aggregate(clients)
    for name in SHAPES:
        mean_A = sum(adapter[name].lora_A for adapter, _ in clients) / 3
        mean_B = sum(adapter[name].lora_B for adapter, _ in clients) / 3
        of_factors = clients[0][0][name].scaling * (mean_B @ mean_A)
        assert reference.relative_error(of_factors, ours.delta_weight(name)) > 0.3


@pytest.mark.parametrize("name", ["flexlora", "residual", "flora"])
def test_the_cap_keeps_the_best_directions_and_reports_what_it_drops(name):
    """Trap T9: the energy that truncation loses is a number, not silence."""
    method = make_method(name, server_max_rank=4, server_learning_rate=1.0)
    round_ = OneRound(method)
    updates = [round_.update(k, 10 + k) for k in range(4)]
    state = round_.finish(updates)
    clients = [(update.adapter, update.num_examples) for update in updates]
    dense = {n: reference.flexlora_average(clients, n) for n in SHAPES}
    assert distance(state.change, {n: reference.truncate(dense[n], 4) for n in SHAPES}) < 1e-10
    tail = sum(float((dense[n] - reference.truncate(dense[n], 4)).square().sum()) for n in SHAPES)
    total = sum(float(dense[n].square().sum()) for n in SHAPES)
    assert state.dropped_energy == pytest.approx(tail / total, rel=1e-9)
    assert all(svd.rank == 4 for svd in state.change.values())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_round_without_updates_is_the_same_state_one_round_later(name):
    state = next_state(name)
    later = OneRound(name, state).finish([])
    assert later.round == 2 and same_bits(later, state)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_two_rounds_of_one_method_do_not_feel_each_other(name):
    method = make_method(name)
    round_ = OneRound(method, next_state(method))
    mine, others = [round_.update(1, 9), round_.update(2, 2)], [round_.update(0, 5)]
    alone = round_.finish(mine)
    first, second = round_.open(), round_.open()
    first.add(others[0])
    for update in mine:
        second.add(update)
    first.close()
    assert same_bits(second.close(), alone)


@pytest.mark.parametrize(
    "call",
    [make_method, lambda name: aggregate([(random_adapter(SHAPES), 1)], method=name)],
)
def test_an_unknown_method_is_an_error_that_names_the_nearest(call):
    """Trap T20: a misspelt method that silently runs FedAvg."""
    with pytest.raises(UserError, match=r"'flexlore' is unknown.*Did you mean 'flexlora'"):
        call("flexlore")


def test_aggregate_keeps_the_dtype_of_the_first_adapter():
    for dtype in (torch.float32, torch.float64):
        total = aggregate([(random_adapter(SHAPES, dtype=dtype), 3)])
        assert total.delta_weight("attn.q").dtype == dtype


def test_the_python_interface_of_the_readme():
    """One client at rank 3 comes back at rank 3, 8 and 2."""
    factors = random_factors(12, 12, 3, alpha=16.0)
    adapter = Adapter({"q": factors})
    total = aggregate([(adapter, 120), (adapter, 80)], method="flexlora")
    own = reference.delta_weight(factors)
    assert reference.relative_error(total.delta_weight("q"), own) < 1e-12
    for rank in (2, 3, 8):
        sent = total.adapter(rank=rank, alpha=16.0)["q"]
        assert sent.rank == rank
        truncated = reference.truncate(own, rank)
        assert reference.relative_error(sent.delta_weight(), truncated) < 1e-10
    assert total.energy_kept(rank=3)["q"] == pytest.approx(1.0, abs=1e-12)
