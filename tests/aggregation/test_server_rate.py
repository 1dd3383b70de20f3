"""The server's rate from a round's own updates: FedExP's rule, its bounds, and where it is used."""

from dataclasses import replace

import pytest
import torch

import equations
from flexlora import Adapter
from flexlora.aggregation import make_method, method_class
from flexlora.aggregation.engine.server_rate import ChangeNorms, change_energy
from flexlora.algebra.decompose import MatrixSum
from flexlora.errors import UserError
from flexlora.lora.adapters import LoRAFactors
from one_round import OneRound, distance, next_state, same_bits

ADAPTIVE = ("aligned", "basis", "carried", "residual")


def rate_of(method, updates, round_):
    return round_.finish(updates).server_learning_rate


def replies_of(round_, updates):
    return [
        equations.Reply(
            adapter=update.adapter,
            num_examples=update.num_examples,
            start=round_.sent[update.rank_class].trained,
        )
        for update in updates
    ]


def single_entry(row, value=1.0):
    """One module whose only change is ``value`` at ``[row, row]``."""
    lora_A, lora_B = torch.zeros(1, 12), torch.zeros(12, 1)
    lora_A[0, row], lora_B[row, 0] = 1.0, value
    factors = LoRAFactors(lora_A=lora_A.double(), lora_B=lora_B.double(), alpha=1.0)
    return Adapter({"w": factors})


def rate_of_changes(adapters, weights):
    norms, total = ChangeNorms(), sum(weights)
    terms = []
    for adapter, weight in zip(adapters, weights, strict=True):
        norms.add(change_energy(adapter), weight)
        factors = adapter["w"]
        terms.append((weight / total * factors.scaling, factors.lora_B, factors.lora_A))
    return norms.rate({"w": MatrixSum(shape=(12, 12), terms=tuple(terms))})


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_default_rate_is_fedexp_s_over_all_modules(name):
    """From a trained state, over a wire that rounds: against the starts that were decoded."""
    method = make_method(name)
    round_ = OneRound(method, next_state(method), wire="bfloat16")
    updates = [round_.update(k, 10 + 9 * k) for k in range(4)]
    starts = replies_of(round_, updates)
    expected = equations.rate_of_round(starts)
    assert 1.1 < expected < 1.9 and rate_of(method, updates, round_) == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize("name", ADAPTIVE)
def test_one_client_is_taken_as_it_is(name):
    """The rate 2 of before put the model of a single client as far beyond its optimum again."""
    round_ = OneRound(name, next_state(name))
    state = round_.finish([round_.update(1, 17)])
    plain = OneRound(make_method(name, server_learning_rate=1.0), round_.state)
    assert state.server_learning_rate == 1.0
    assert same_bits(state, plain.finish([plain.update(1, 17)]))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_clients_that_agree_get_rate_1(name):
    round_ = OneRound(name, next_state(name))
    first = round_.update(1, 17)
    updates = [replace(first, client_id=f"client_{k}") for k in range(7)]
    assert rate_of(name, updates, round_) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 11])
def test_clients_whose_changes_are_orthogonal_get_half_their_number_up_to_2(count):
    adapters = [single_entry(k) for k in range(count)]
    expected = min(2.0, max(1.0, count / 2))
    assert rate_of_changes(adapters, [3.0] * count) == pytest.approx(expected)


def test_changes_that_cancel_out_are_not_blown_up():
    """FedExP's quotient has no bound there; the paper adds a constant to its denominator."""
    opposed = [single_entry(0, (-1.0) ** k) for k in range(8)]
    assert rate_of_changes(opposed, [1.0] * 8) == 2.0
    nearly = [single_entry(0, (-1.0) ** k * (1 + 1e-3 * k)) for k in range(8)]
    assert rate_of_changes(nearly, [1.0] * 8) == 2.0
    assert rate_of_changes([single_entry(0, 0.0)] * 8, [1.0] * 8) == 2.0


def test_a_client_with_nearly_all_examples_is_as_one_client():
    adapters = [single_entry(k) for k in range(8)]
    assert rate_of_changes(adapters, [100.0] + [1.0] * 7) == 1.0
    assert rate_of_changes(adapters, [1.0] * 8) == 2.0


def test_order_and_the_unit_of_the_weights_do_not_matter():
    adapters = [single_entry(k // 2, 1.0 + k) for k in range(6)]
    weights = [5.0, 1.0, 3.0, 2.0, 8.0, 4.0]
    rate = rate_of_changes(adapters, weights)
    assert 1.0 < rate < 2.0
    assert rate_of_changes(adapters[::-1], weights[::-1]) == pytest.approx(rate, rel=1e-12)
    assert rate_of_changes(adapters, [1000 * w for w in weights]) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_discount_counts_as_so_many_examples(name):
    round_ = OneRound(name, next_state(name))
    updates = [round_.update(k, 40 + 8 * k) for k in range(4)]
    discounted = [*updates[:-1], replace(updates[-1], discount=0.25)]
    fewer = [*updates[:-1], replace(updates[-1], num_examples=updates[-1].num_examples // 4)]
    rate = rate_of(name, discounted, round_)
    assert rate == rate_of(name, fewer, round_) != rate_of(name, updates, round_)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_number_is_that_number_and_the_rule_s_number_gives_the_rule_s_bits(name, optimizer):
    method = make_method(name, server_optimizer=optimizer)
    round_ = OneRound(method, next_state(method))
    updates = [round_.update(k, 10 + 9 * k) for k in range(4)]
    by_rule = round_.finish(updates)
    rate = by_rule.server_learning_rate
    for given in (rate, 1.0):
        fixed = make_method(name, server_optimizer=optimizer, server_learning_rate=given)
        result = OneRound(fixed, round_.state).finish(updates)
        assert result.server_learning_rate == given
        assert same_bits(result, by_rule) == (given == rate)
    assert distance(by_rule.change, round_.state.change) > 0.01


def test_a_round_without_updates_reports_no_rate():
    assert OneRound("carried", next_state("carried")).finish([]).server_learning_rate is None


def test_only_methods_whose_sum_is_a_change_follow_the_round():
    for name in ADAPTIVE:
        assert method_class(name).Options(name=name).server_learning_rate == 0.0
    for name in ("flexlora", "flora", "fedex-lora"):
        assert method_class(name).Options(name=name).server_learning_rate == 1.0
        with pytest.raises(UserError, match=r"server-learning-rate is 0.0, expected more than 0"):
            make_method(name, server_learning_rate=0.0)
