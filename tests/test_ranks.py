"""Rank classes and the policies that deal them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.errors import UserError
from flexlora.ranks import RankClass, assign_ranks, parse_shares, parse_tiers, quotas

POLICY = {"policy": "tiers", "fixed": 8, "tiers": "4,8,16", "shares": "equal", "seed": 0}


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


def test_every_tier_gets_its_exact_number_of_clients():
    """Trap T4: ranks that are configured but never applied."""
    ids = [f"client_{i}" for i in range(24)]
    table = assign_ranks(
        ids, **{**POLICY, "tiers": "2,4,8,16", "shares": "0.5,0.25,0.15,0.1", "seed": 5}
    )
    counted = [sum(c.rank == rank for c in table.values()) for rank in (2, 4, 8, 16)]
    assert counted == [12, 6, 4, 2]
    assert all(c.name == f"rank_{c.rank}" for c in table.values())


def test_the_deal_depends_on_the_set_of_ids_and_the_seed_only():
    ids = [f"c{i}" for i in range(30)]
    table = assign_ranks(ids, **POLICY)
    assert assign_ranks(ids[::-1], **POLICY) == table
    assert assign_ranks(ids, **{**POLICY, "seed": 1}) != table


def test_one_fixed_rank_for_all():
    table = assign_ranks(["a", "b"], **{**POLICY, "policy": "fixed"})
    assert {c.rank for c in table.values()} == {8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "fixed", "fixed": 0}, "ranks.fixed is 0, expected a rank of at least 1"),
        ({"policy": "tears"}, "ranks.policy is 'tears'.*Did you mean 'tiers'"),
        ({"tiers": "4,4"}, "names a rank twice"),
        ({"shares": "0.5,0.1"}, "2 shares for 3 tiers"),
    ],
)
def test_policies_that_make_no_sense_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        assign_ranks(["a", "b"], **{**POLICY, **change})
