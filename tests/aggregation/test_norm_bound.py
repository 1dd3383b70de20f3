"""The bound on an update's norms: what it refuses, when it is known, and what it remembers."""

import itertools
import json
import math
from dataclasses import replace

import pytest

import reference
from flexlora import Adapter
from flexlora.aggregation import METHODS
from flexlora.aggregation.engine.norm_bound import NormBound, NormHistory, Norms, norms_of
from flexlora.errors import UpdateRefused
from one_round import OneRound, same_bits

FACTOR = 50.0


def judged(round_, update):
    """The update with its norms, as the server makes it."""
    start = round_.sent[update.rank_class].for_client(update.client_id)
    return replace(update, norms=norms_of(update.adapter, start.trained))


def larger(update, label, factor):
    """The update with one factor of every module multiplied."""
    modules = {
        name: replace(factors, **{label: factor * getattr(factors, label)})
        for name, factors in update.adapter.items()
    }
    return replace(update, adapter=Adapter(modules))


def honest(round_, count=4):
    return [judged(round_, round_.update(k, 10 + k)) for k in range(count)]


def known_from(updates):
    history = NormHistory()
    history.learn(1, [update.norms for update in updates])
    return history.bound(FACTOR)


@pytest.mark.parametrize("method", ["residual", "flora", "fedit", "fed-plora"])
def test_the_norms_are_those_of_dense_matrices(method):
    round_ = OneRound(method)
    update = judged(round_, round_.update(3, 1))
    start = round_.sent[update.rank_class].for_client("client_3").trained
    change = A = B = 0.0
    for name, factors in update.adapter.items():
        moved = reference.delta_weight(factors) - reference.delta_weight(start[name])
        change += float(moved.square().sum())
        A += float(factors.lora_A.double().square().sum())
        B += float((factors.scaling * factors.lora_B.double()).square().sum())
    found = update.norms
    assert found.change == pytest.approx(change, rel=1e-9)
    assert (found.lora_A, found.lora_B) == (pytest.approx(A), pytest.approx(B))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("early", [True, False])
def test_a_factor_times_a_million_is_refused_and_the_round_is_the_one_without_it(method, early):
    """``early``: the bound is known from rounds before; else only once the round is complete."""
    round_ = OneRound(method)
    updates = honest(round_)
    label = round_.sent[updates[0].rank_class].trainable[-1]
    evil = judged(round_, larger(round_.update(4, 10), label, 1e6))
    asked = {u.client_id: u.rank_class for u in [*updates, evil]}
    bound = known_from(updates) if early else NormBound(factor=FACTOR)

    def finish(arrived):
        opened, causes = round_.open(asked, bound=bound, most_updates=5), {}
        for update in arrived:
            try:
                opened.add(update)
            except UpdateRefused as error:
                causes[update.client_id] = str(error)
                opened.skip(update.client_id)
        for client_id in asked.keys() - {u.client_id for u in arrived}:
            opened.skip(client_id)
        return opened, causes | dict(opened.settle().refused)

    without, none = finish(updates)
    expected = without.close()
    for place in (0, 2, 4):
        opened, causes = finish([*updates[:place], evil, *updates[place:]])
        assert list(causes) == ["client_4"] and none == {}
        assert "the norm of its" in causes["client_4"] and "50 times that" in causes["client_4"]
        assert same_bits(opened.close(), expected)


def test_small_products_of_large_factors_are_refused_too():
    """A mean of factors multiplies one client's large A by the others' B."""
    round_ = OneRound("fedit")
    bound = known_from(honest(round_))
    balanced = larger(larger(round_.update(4, 10), "lora_A", 1e6), "lora_B", 1e-6)
    cause = bound.refusal(judged(round_, balanced).norms)
    assert cause.startswith("the norm of its lora_A is")


def test_the_bound_is_the_factor_times_the_lower_median_of_what_is_not_zero():
    known = [Norms(v * v, 1.0, 1.0) for v in (0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 1000.0)]
    bound = NormBound(factor=10.0, known=known)
    assert bound.medians["change"] == 2.0
    assert bound.refusal(Norms(20.0**2, 1.0, 1.0)) == ""
    assert "is 20.1, the median of the last updates 2 and" in bound.refusal(Norms(20.1**2, 1, 1))
    assert "is nan" in bound.refusal(Norms(math.nan, 1.0, 1.0))
    assert NormBound(factor=0.0, known=known).refusal(Norms(1e60, 1.0, 1.0)) == ""
    nobody_moved = NormBound(factor=10.0, known=[Norms(0.0, 1.0, 1.0)] * 3)
    assert nobody_moved.refusal(Norms(4.0, 1.0, 1.0)) == ""


def test_of_two_updates_in_a_first_round_the_larger_one_is_judged():
    round_ = OneRound("residual")
    small = judged(round_, round_.update(0, 10))
    evil = judged(round_, larger(round_.update(1, 10), "lora_B", 1e6))
    for order in itertools.permutations([small, evil]):
        opened = round_.open(bound=NormBound(factor=FACTOR))
        for update in order:
            opened.add(update)
        assert list(opened.settle().refused) == ["client_1"]


def test_a_history_goes_through_json_with_its_bits_and_forgets():
    round_ = OneRound("residual")
    updates = honest(round_)
    history = NormHistory()
    for server_round in range(1, 8):
        history.learn(server_round, [u.norms for u in updates[: 1 + server_round % 4]])
    history.learn(8, [])
    assert sorted(history.rounds) == [3, 4, 5, 6, 7]
    again = NormHistory.from_dict(json.loads(json.dumps(history.to_dict())))
    assert again == history and again.bound(FACTOR) == history.bound(FACTOR)


def test_what_is_remembered_does_not_depend_on_the_order_of_arrival():
    round_ = OneRound("residual")
    updates = honest(round_)
    histories = []
    for order in itertools.permutations(updates):
        opened = round_.open(bound=NormBound(factor=FACTOR))
        for update in order:
            opened.add(update)
        histories.append(NormHistory())
        histories[-1].learn(1, opened.settle().norms)
    assert all(history == histories[0] for history in histories)
