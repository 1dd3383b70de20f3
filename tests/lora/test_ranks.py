"""Rank classes and the policies that deal them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.errors import UserError
from flexlora.lora.ranks import RankClass, parse_shares, parse_tiers, quotas


@pytest.mark.parametrize("fields", [{"rank": 0}, {"rank": -3}, {"rank": 4, "pattern": (("q", 0),)}])
def test_a_rank_class_of_rank_zero_is_refused(fields):
    with pytest.raises(UserError, match=r"rank class 'x' has rank -?\d, expected at least 1"):
        RankClass(name="x", **fields)


def test_a_rank_is_capped_at_the_smaller_side_of_its_module():
    ranks = RankClass(name="x", rank=10).ranks({"wide": (64, 6), "tall": (5, 64), "big": (64, 64)})
    assert ranks == {"wide": 6, "tall": 5, "big": 10}


def test_the_first_pattern_that_matches_gives_the_rank():
    """The paper's type 3: 30 in attention, 200 in the MLP."""
    third = RankClass(name="type_3", rank=30, pattern=((r"\.mlp\.", 200), (r"mlp\.up", 7)))
    shapes = {"layers.0.self_attn.q": (256, 256), "layers.0.mlp.up": (512, 256)}
    assert third.ranks(shapes) == {"layers.0.self_attn.q": 30, "layers.0.mlp.up": 200}


def test_a_rank_class_survives_plain_values():
    import json

    original = RankClass(name="x", rank=4, pattern=(("mlp", 8),), carried_rank=64)
    assert RankClass.from_dict(json.loads(json.dumps(original.to_dict()))) == original


@pytest.mark.parametrize(
    ("before", "rank", "after"),
    [
        (RankClass.of(16), 8, RankClass.of(8)),
        (RankClass.of(4), 8, RankClass.of(4)),
        (
            RankClass.of(16, carried_rank=64),
            8,
            RankClass(name="rank_8_carried_64", rank=8, carried_rank=64),
        ),
        (
            RankClass(name="rank_30_mlp_200", rank=30, pattern=(("mlp", 200),)),
            100,
            RankClass(name="rank_30_mlp_200_to_100", rank=30, pattern=(("mlp", 100),)),
        ),
    ],
)
def test_a_lowered_class_trains_at_that_rank_at_most(before, rank, after):
    assert before.lowered(rank) == after


def test_a_class_that_is_lowered_twice_is_named_once():
    """Two clients that come to the same ranks by other steps are of one class."""
    third = RankClass(name="rank_30_mlp_200", rank=30, pattern=(("mlp", 200),))
    assert third.lowered(100).lowered(20) == third.lowered(20)
    assert third.lowered(20).name == "rank_30_mlp_200_to_20"


def test_the_largest_rank_is_that_of_any_module():
    assert RankClass.of(8).largest == 8
    assert RankClass(name="x", rank=30, pattern=(("mlp", 200), ("q", 4))).largest == 200


def test_tiers_are_parsed_ascending():
    assert parse_tiers("16, 4,8") == (4, 8, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4,eight", "ranks.tiers is '4,eight', expected whole numbers"),
        ("", "ranks.tiers is '', expected whole numbers"),
        ("4,2.5", "expected whole numbers"),
        ("0,4", "ranks.tiers has rank 0, expected ranks of at least 1"),
        ("-4", "ranks.tiers has rank -4"),
        ("4,8,4", "ranks.tiers is '4,8,4' and names a rank twice"),
    ],
)
def test_tiers_that_make_no_sense_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_tiers(text)


def test_shares_are_parsed():
    assert parse_shares("0.5,0.25,0.25", 3) == (0.5, 0.25, 0.25)
    assert parse_shares("equal", 4) == (0.25,) * 4
    assert parse_shares("1.0,0", 2) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5,0.5", "ranks.shares has 2 shares for 3 tiers"),
        ("0.5,0.25,0.2", "adds up to 0.95, expected shares of at least 0 that add up to 1"),
        ("1.5,-0.25,-0.25", "expected shares of at least 0"),
        ("half,half,none", "expected numbers or 'equal'"),
        ("inf,0,0", "add up to 1"),
        ("nan,0.5,0.5", "ranks.shares is 'nan,0.5,0.5'"),
    ],
)
def test_shares_that_do_not_add_up_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_shares(text, 3)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_quotas_add_up_and_are_off_by_less_than_one(weights, count):
    shares = [weight / sum(weights) for weight in weights]
    dealt = quotas(shares, count)
    assert sum(dealt) == count
    for share, got in zip(shares, dealt, strict=True):
        assert abs(got - share * count) < 1.0 + 1e-6
        assert share > 0 or got == 0


def test_quotas_by_hand():
    assert quotas((0.5, 0.25, 0.15, 0.1), 24) == [12, 6, 4, 2]
    assert quotas((1 / 3, 1 / 3, 1 / 3), 10) == [4, 3, 3]
    assert quotas((0.1,) * 10, 10) == [1] * 10
