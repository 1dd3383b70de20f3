"""The bound on an update's share of a round: its law, its level, and rounds that are cut."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flexlora.aggregation import METHODS
from flexlora.aggregation.engine.weight_cap import largest_share, weight_level
from one_round import OneRound, distance, same_bits

WEIGHTS = st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=12)


def cut(weights):
    level = weight_level(weights)
    return [min(weight, level) for weight in weights]


@hypothesis_settings(max_examples=200, deadline=None)
@given(WEIGHTS)
def test_no_weight_is_more_than_its_share_and_those_below_are_untouched(weights):
    after, share = cut(weights), largest_share(len(weights))
    assert max(after) <= share * math.fsum(after) * (1 + 1e-9)
    largest = max(after)
    assert all(a in (w, largest) for a, w in zip(after, weights, strict=True))
    if max(weights) <= share * math.fsum(weights) * (1 - 1e-12):
        assert after == weights
    else:
        assert largest == pytest.approx(share * math.fsum(after), rel=1e-9)


@hypothesis_settings(max_examples=100, deadline=None)
@given(WEIGHTS, st.integers(1, 8))
def test_the_level_of_a_part_is_never_above_that_of_all(weights, more):
    """So an update that is below it can be added before the others are in."""
    whole = weight_level(weights)
    for count in range(1, len(weights)):
        assert weight_level(weights[:count], largest_share(len(weights))) <= whole * (1 + 1e-9)
    assert weight_level(weights, largest_share(len(weights) + more)) <= whole * (1 + 1e-9)


def test_the_figures_of_the_docs():
    shares = {count: largest_share(count) for count in (1, 2, 4, 8, 24, 100, 1000)}
    assert shares[1] == 1.0 and shares[4] == pytest.approx(2 / 3)
    assert [round(s, 2) for s in shares.values()] == [1.0, 0.83, 0.67, 0.52, 0.34, 0.18, 0.06]
    assert weight_level([]) == 0.0 and cut([0.0, 0.0, 5.0]) == [0.0, 0.0, 5.0]


@pytest.mark.parametrize("method", ["residual", "fedit", "raflora", "rbla", "carried"])
def test_a_claim_of_a_billion_examples_is_the_round_with_its_largest_share(method):
    """Against the same round in which that client claims exactly what the bound leaves it."""
    round_ = OneRound(method)
    honest = [round_.update(k, 10 + k) for k in range(3)]
    liar = round_.update(3, 10**9)
    cut_round = round_.finish([*honest, liar], most_updates=4)
    others = sum(update.num_examples for update in honest)
    share = largest_share(4)
    scaled = [replace(u, num_examples=10**6 * u.num_examples) for u in honest]
    fair = replace(liar, num_examples=round(10**6 * others * share / (1 - share)))
    expected = round_.finish([*scaled, fair])
    dense = {name: expected.change[name].to_dense() for name in expected.change}
    assert distance(cut_round.change, dense) < 1e-6
    assert distance(round_.finish([*honest, liar]).change, dense) > 0.1, "without the bound"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_without_a_large_share_the_bits_are_those_without_a_bound(method):
    round_ = OneRound(method)
    updates = [round_.update(k, 10 + 7 * k) for k in range(6)]
    asked = {u.client_id: u.rank_class for u in updates}
    assert same_bits(round_.finish(updates, asked, most_updates=9), round_.finish(updates, asked))


@pytest.mark.parametrize("large", [0, 2, 3])
def test_the_order_of_arrival_does_not_matter(large):
    """Neither for a client whose turn is first, nor for the last; some wait until the close."""
    round_ = OneRound("carried")
    sizes = [10, 11, 12, 13]
    sizes[large] = 10**6
    updates = [round_.update(k, size) for k, size in enumerate(sizes)]
    asked = {u.client_id: u.rank_class for u in updates} | {"client_9": updates[0].rank_class}

    def finish(order):
        opened = round_.open(asked, most_updates=5)
        for update in order:
            opened.add(update)
        opened.skip("client_9")
        return opened.close()

    first = finish(updates)
    for order in itertools.permutations(updates):
        assert same_bits(finish(order), first)


def test_updates_of_usual_size_do_not_wait_for_the_close():
    """The memory of a round stays that of its sums."""
    round_ = OneRound("carried")
    updates = [round_.update(k, 10) for k in range(12)]
    opened = round_.open({u.client_id: u.rank_class for u in updates}, most_updates=12)
    waiting = []
    for update in sorted(updates, key=lambda u: opened._places[u.client_id]):
        opened.add(update)
        waiting.append(len(list(opened._waiting)))
    assert max(waiting) <= 3 and waiting[-1] == 0


def test_the_settlement_names_who_was_cut_and_by_how_much():
    round_ = OneRound("residual")
    opened = round_.open(most_updates=3)
    for k, size in enumerate((10, 10, 1000)):
        opened.add(round_.update(k, size))
    settled = opened.settle()
    share = largest_share(3)
    assert settled.shares == {"client_2": pytest.approx(20 * share / (1 - share) / 1000)}
    assert settled.refused == {} and opened.settle() is settled
