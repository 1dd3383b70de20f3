"""Tasks and clients that nobody trains on."""

import pytest

from flexlora.data.held_out import check_held_out, held_out_names, without_held_out
from flexlora.data.rows import Row
from flexlora.errors import UserError


def clients(count=20):
    """Client k has rows of the tasks ``a`` (a second category) and ``bK``."""
    return {
        f"c{k:02d}": {
            split: [
                Row(instruction="x", output="y", task="a", category="first"),
                Row(instruction="x", output="y", task=f"b{k % 2}", category="second"),
            ]
            for split in ("train", "validation", "test")
        }
        for k in range(count)
    }


def tasks_of(held, split):
    return {row.task for splits in held.values() for row in splits[split]}


def test_train_rows_of_tasks_and_categories_are_taken_away_and_no_others():
    held = without_held_out(clients(), "b1; first", 0.0, seed=0)
    assert tasks_of(held, "train") == {"b0"}
    assert tasks_of(held, "test") == tasks_of(held, "validation") == {"a", "b0", "b1"}
    assert without_held_out(clients(), "", 0.0, seed=0) == clients(), "the control"


def test_a_share_of_the_clients_that_have_train_rows_trains_on_nothing():
    held = without_held_out(clients(), "first;b1", 0.3, seed=0)
    without = [client for client, splits in held.items() if not splits["train"]]
    assert len(without) == 10 + 3, "ten are left without rows by their tasks, 3 of 10 are drawn"
    assert all(splits["test"] for splits in held.values())
    other = without_held_out(clients(), "first;b1", 0.3, seed=1)
    assert [c for c, s in other.items() if not s["train"]] != without
    assert held == without_held_out(clients(), "first;b1", 0.3, seed=0)


def test_one_client_is_never_drawn():
    assert without_held_out(clients(1), "", 0.9, seed=0)["c00"]["train"]


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ("b0;secondd", "has 'secondd', which is no task or category.*Did you mean 'second'"),
        ("first;second", "holds out every train row"),
    ],
)
def test_unknown_names_and_nothing_left_are_refused(names, match):
    with pytest.raises(UserError, match=match):
        check_held_out(clients(), names)
    check_held_out(clients(), "b0")


def test_names_are_separated_by_semicolons_since_categories_have_commas():
    assert held_out_names(" Cause, Effect ;x; ") == {"Cause, Effect", "x"}
