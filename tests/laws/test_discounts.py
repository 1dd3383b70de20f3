"""A late update counts ``discount`` times what it would, by every method and whatever its weights.

A method's weights may be examples, norms or anything else (``Needs.weight``), so the law is stated
without them: m copies of an update at discount d count as one at discount m d. Where they are
examples, d also counts as d times the examples; where they are not, examples count for nothing.
"""

from dataclasses import replace

import pytest
import torch

import equations
from flexlora import aggregate
from flexlora.aggregation import METHODS, make_method
from flexlora.aggregation.engine.sums import Needs, by_examples
from flexlora.aggregation.engine.updates import Update
from law_checks import VARIANTS, variant
from one_round import SHAPES, OneRound, distance, next_state, same_bits


def late_round(method):
    """A round with a start of the round before among those it knows, and who comes late in it."""
    first = OneRound(method)
    state = first.finish([first.update(k, 10 + 7 * k) for k in range(5)])
    round_ = OneRound(method, state)
    round_.sent["rank_3@0"] = first.sent["rank_3"]
    late = first.update(7, 48, rank_class="rank_3", seed=3)
    late = replace(late, rank_class="rank_3@0", late=True)
    return round_, [round_.update(k, 20 + 9 * k) for k in range(3)], late


def same_kind(round_):
    """Whether this round trains what the last one did: of other updates the server takes none."""
    kinds = {(s.trainable, s.local) for s in round_.sent.values()}
    return len(kinds) == 1


def copies(late, count, discount):
    """The same update of the same client, late from as many rounds."""
    return [replace(late, base_round=-k, discount=discount) for k in range(count)]


@pytest.mark.parametrize("label", VARIANTS)
def test_copies_at_a_part_of_the_discount_count_as_one_update(label):
    round_, prompt, late = late_round(variant(label))
    if not same_kind(round_):
        assert variant(label).name == "rolora"
        pytest.skip("RoLoRA's rounds alternate: the server refuses the update of the last one")
    expected = round_.finish([*prompt, *copies(late, 1, 0.75)])
    result = round_.finish([*prompt, *copies(late, 3, 0.25)])
    assert distance(result.change, expected.change) < 1e-12
    whole = round_.finish([*prompt, late])
    assert distance(whole.change, expected.change) > 1e-3


def by_weights_of_its_own(method):
    return method.needs.weight is not by_examples


@pytest.mark.parametrize("label", VARIANTS)
def test_a_discount_counts_as_that_part_of_the_examples(label):
    """By a power of two to the last bit; ``hetlora`` weighs by norms and must not see examples."""
    method = variant(label)
    round_, prompt, late = late_round(method)
    quarter = round_.finish([*prompt, replace(late, discount=0.25)])
    fewer = round_.finish([*prompt, replace(late, num_examples=12)])
    assert by_weights_of_its_own(method) == (method.name == "hetlora")
    if by_weights_of_its_own(method):
        assert same_bits(fewer, round_.finish([*prompt, late]))
        assert distance(quarter.change, fewer.change) > 1e-3
    else:
        assert same_bits(quarter, fewer)


@pytest.mark.parametrize("label", VARIANTS)
def test_a_smaller_discount_is_another_sum_and_none_is_the_round_without_the_update(label):
    round_, prompt, late = late_round(variant(label))
    whole = round_.finish([*prompt, late])
    little = round_.finish([*prompt, replace(late, discount=0.01)])
    assert distance(little.change, whole.change) > 1e-3
    without = round_.finish(prompt)
    assert same_bits(round_.finish([*prompt, replace(late, discount=0.0)]), without)
    assert not same_bits(little, without)
    alone = round_.finish([replace(late, discount=0.0)])
    assert same_bits(alone, round_.state) and alone.round == round_.state.round + 1


def test_hetlora_weighs_by_the_discounted_norm():
    """Against the dense equation, in which an update's norm is multiplied by its discount."""
    round_, prompt, late = late_round(make_method("hetlora"))
    result = round_.finish([*prompt, replace(late, discount=0.3)])
    updates = [*prompt, late]
    norms = [
        sum(float(f.delta_weight().square().sum()) for f in update.adapter.values()) ** 0.5
        for update in updates
    ]
    weights = [d * norm for d, norm in zip([1.0, 1.0, 1.0, 0.3], norms, strict=True)]
    for module in SHAPES:
        A = B = 0.0
        for weight, update in zip(weights, updates, strict=True):
            own_A, own_B = equations.padded(update.adapter[module], 7)
            A, B = A + weight / sum(weights) * own_A, B + weight / sum(weights) * own_B
        torch.testing.assert_close(
            result.change.delta_weight(module), torch.from_numpy(B @ A), rtol=1e-10, atol=1e-12
        )


def test_a_weight_that_a_new_method_brings_is_discounted_too():
    method = make_method("flexlora")
    method.needs = Needs(products=True, weight=lambda update: 1.0)
    round_, prompt, late = late_round(method)
    halves = round_.finish([*prompt, *copies(late, 2, 0.5)])
    assert distance(halves.change, round_.finish([*prompt, late]).change) < 1e-12


def test_the_gap_between_factors_and_products_is_that_of_the_discounted_sum():
    round_, prompt, late = late_round(make_method("flexlora"))
    quarter = round_.finish([*prompt, replace(late, discount=0.25)], factor_gap=True)
    fewer = round_.finish([*prompt, replace(late, num_examples=12)], factor_gap=True)
    whole = round_.finish([*prompt, late], factor_gap=True)
    for module in SHAPES:
        gaps = [state.modules[module]["factor_gap"] for state in (quarter, fewer, whole)]
        assert gaps[0] == gaps[1] != gaps[2]


@pytest.mark.parametrize("discount", [-0.1, 1.5, float("nan")])
def test_a_discount_is_a_share(discount):
    adapter = next_state("flexlora").change.adapter(2, 1.0)
    assert aggregate([(adapter, 1)])
    with pytest.raises(ValueError, match=r"discount is .*, expected 0 to 1"):
        Update(client_id="a", adapter=adapter, num_examples=1, discount=discount)


def test_every_method_is_under_these_laws():
    assert {name for name, _ in VARIANTS.values()} == set(METHODS)
