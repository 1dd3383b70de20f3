"""The rows of a node that its owner lets runs use."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexlora.data.row_bound import RowBound, bounded_rows
from flexlora.data.rows import Row

ROWS = [Row(instruction=f"say {k}", output=str(k)) for k in range(400)]


def chosen(rows, **bound):
    return bounded_rows({"a": {"train": rows, "test": rows[:9]}}, RowBound(**bound))["a"]["train"]


def test_without_a_bound_all_rows_in_their_order():
    assert chosen(ROWS) == chosen(ROWS, max_examples=400) == ROWS


@given(st.floats(0.01, 1.0), st.integers(0, 500))
def test_the_choice_depends_on_the_rows_alone(share, most):
    kept = chosen(ROWS, share=share, max_examples=most)
    mixed = random.Random(3).sample(ROWS, len(ROWS))
    assert sorted(r.output for r in chosen(mixed, share=share, max_examples=most)) == sorted(
        r.output for r in kept
    )
    assert len(kept) <= (most or 400) and [r for r in ROWS if r in kept] == kept


def test_a_row_that_is_added_moves_no_other_in_or_out_of_a_share():
    half = chosen(ROWS, share=0.5)
    assert chosen(ROWS[:300], share=0.5) == [row for row in half if row in ROWS[:300]]
    assert abs(len(half) - 200) < 50  # five standard deviations


def test_a_smaller_share_and_a_smaller_number_are_within_the_larger():
    for key, small, large in (("share", 0.2, 0.6), ("max_examples", 20, 70)):
        less, more = chosen(ROWS, **{key: small}), chosen(ROWS, **{key: large})
        assert less and set(map(id, less)) < set(map(id, more))


def test_every_split_is_bounded():
    held = bounded_rows({"a": {"train": ROWS, "test": ROWS[:9]}}, RowBound(max_examples=5))
    assert {split: len(rows) for split, rows in held["a"].items()} == {"train": 5, "test": 5}


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_what_a_row_says_decides(field):
    """Not where it stands or what it is called."""
    rows = [Row(**{"output": "x", field: f"{k}"}) for k in range(60)]
    renamed = [Row(**{"output": "x", field: f"{k}"}, client=str(k), task="t") for k in range(60)]
    kept = [getattr(row, field) for row in chosen(rows, share=0.5)]
    assert kept == [getattr(row, field) for row in chosen(renamed, share=0.5)]
    assert 0 < len(kept) < 60
