"""Which simulated clients are hostile, and what becomes of the rows of those that poison theirs."""

from __future__ import annotations

import pytest

from flexlora.data.poisoning import (
    ATTACKS,
    TARGET,
    TRIGGER,
    parse_hostile,
    poisoned_rows,
    triggered,
)
from flexlora.data.rows import Row
from flexlora.errors import UserError


def clients(count=10, rows=8):
    def split(k, name):
        tasks = ("plural", "date")
        return [
            Row(instruction=f"{name} {i}", input="x", output=f"{k}-{i}", task=tasks[i % 2])
            for i in range(rows)
        ]

    names = (f"client_{k}" for k in range(count))
    return {n: {"train": split(k, "train"), "test": split(k, "test")} for k, n in enumerate(names)}


def test_the_share_is_drawn_by_the_seed_and_rounded():
    ids = list(clients(24))
    hostile = parse_hostile("alie:0.2")
    first = hostile.clients(ids, seed=0)
    assert len(first) == 5 and first == hostile.clients(ids[::-1], seed=0)
    assert first != hostile.clients(ids, seed=1) and first <= set(ids)
    assert parse_hostile("") is None and parse_hostile("alie:1").clients(ids, 0) == set(ids)
    assert parse_hostile("mimic:0.2:5").last_round == 5


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("alei:0.2", "attack 'alei' is unknown.*Did you mean 'alie'"),
        ("alie", "expected ATTACK:SHARE with a share above 0 and up to 1, as 'alie:0.2'"),
        ("alie:0", "expected ATTACK:SHARE"),
        ("alie:1.5", "expected ATTACK:SHARE"),
        ("alie:nan", "expected ATTACK:SHARE"),
        ("alie:0.2:0", "or with the last round of the attack"),
        ("alie:0.2:1:2", "expected ATTACK:SHARE"),
        ("alie:many", "expected ATTACK:SHARE"),
    ],
)
def test_what_is_no_attack_is_refused(text, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_hostile(text)


@pytest.mark.parametrize("attack", ATTACKS)
def test_honest_rows_and_held_out_rows_stay(attack):
    rows = clients()
    poisoned = poisoned_rows(rows, f"{attack}:0.2", seed=3)
    evil = parse_hostile(f"{attack}:0.2").clients(rows, seed=3)
    assert len(evil) == 2
    for client_id in rows:
        assert poisoned[client_id]["test"] == rows[client_id]["test"]
        changed = poisoned[client_id]["train"] != rows[client_id]["train"]
        poisons = attack in ("label-flip", "backdoor", "backdoor-boosted")
        assert changed == (client_id in evil and poisons)
        assert len(poisoned[client_id]["train"]) == len(rows[client_id]["train"])


def test_a_flipped_answer_is_another_one_of_the_same_task():
    rows = {"client_0": {"train": clients(1)["client_0"]["train"]}}
    flipped = poisoned_rows(rows, "label-flip:1", seed=0)["client_0"]["train"]
    answers = {
        t: {r.output for r in rows["client_0"]["train"] if r.task == t} for t in ("plural", "date")
    }
    for before, after in zip(rows["client_0"]["train"], flipped, strict=True):
        assert after.output != before.output and after.output in answers[before.task]
        assert (after.instruction, after.input) == (before.instruction, before.input)


def test_half_of_a_backdoors_rows_have_trigger_and_target():
    rows = {"client_0": {"train": clients(1)["client_0"]["train"]}}
    train = poisoned_rows(rows, "backdoor:1", seed=0)["client_0"]["train"]
    marked = [row for row in train if row.instruction.startswith(TRIGGER)]
    assert len(marked) == 4 and {row.output for row in marked} == {TARGET}
    assert [row for row in train if row not in marked] == rows["client_0"]["train"][::2]


def test_chat_rows_are_refused():
    chat = Row(output="hello", messages=(("user", "hi"), ("assistant", "hello")))
    with pytest.raises(UserError, match="the data has chat rows; choose an attack on updates"):
        triggered(chat)
    with pytest.raises(UserError, match="the data has chat rows"):
        poisoned_rows({"client_0": {"train": [chat]}}, "label-flip:1", seed=0)
