"""Rows with choices or a pattern: what is read and refused, and one prompt for all choices."""

import json

import pytest

from flexlora.config.paths import EMBEDDED
from flexlora.data.collation import encode_rows
from flexlora.data.digests import rows_digests
from flexlora.data.rows import Row, parse_row
from flexlora.data.sources import load_folder
from flexlora.errors import UserError

CHOICES = ["a cat", "two dogs", "owl"]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED)


def row(**keys):
    return {"instruction": "Who?", "choices": CHOICES, **keys}


@pytest.mark.parametrize(
    "obj",
    [
        row(answer=1),
        row(answer="two dogs"),
        row(output="two dogs"),
        {"question": "Who?", "choices": CHOICES, "answer": 1},
        {"prompt": "Who?", "choices": CHOICES, "answer": 1},
    ],
    ids=lambda obj: ",".join(obj),
)
def test_the_right_choice_is_the_output_whatever_the_layout(obj):
    read = parse_row(obj, "here")
    assert (read.instruction, read.output, read.choices) == ("Who?", "two dogs", tuple(CHOICES))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({}, "has 'choices' and no 'answer'.*from 0"),
        ({"answer": 3}, "'answer' is 3, expected a place from 0 to 2"),
        ({"answer": -1}, "'answer' is -1, expected a place from 0 to 2"),
        ({"answer": True}, "not among the choices"),
        ({"answer": "two dog"}, "not among the choices.*Did you mean 'two dogs'"),
        ({"answer": "B"}, "its place from 0 as a number"),
        ({"answer": 0, "output": "owl"}, "'answer' and 'output', expected one"),
        ({"answer": 0, "choices": ["one"]}, "at least two texts"),
        ({"answer": 0, "choices": {"text": CHOICES}}, "expected a list of at least two"),
        ({"answer": 0, "choices": ["a", " "]}, "at least two texts"),
        ({"answer": 0, "choices": ["a", "b", "a "]}, "'a' is there twice"),
        ({"answer": 0, "pattern": "("}, "no regular expression"),
        ({"answer": 0, "pattern": 7}, "expected a regular expression in quotes"),
        ({"answer": 0, "messages": []}, "both 'messages' and"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused_with_their_line(keys, match, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(row(**keys)) + "\n")
    with pytest.raises(UserError, match=match) as error:
        load_folder(tmp_path)
    assert "train.jsonl line 1" in str(error.value)


def test_a_pattern_goes_with_any_row():
    read = parse_row({"instruction": "Add.", "output": "42", "pattern": r"\b42\b"}, "here")
    assert (read.pattern, read.output, read.choices) == (r"\b42\b", "42", None)


def test_all_choices_have_the_same_prompt_cut_for_the_longest(tokenizer):
    long = Row(
        instruction="Say.", input="one two three " * 12, output="no", choices=("no", "no " * 12)
    )
    ((example,), dropped) = encode_rows(
        [long], tokenizer=tokenizer, template="plain", max_length=48
    )
    assert dropped == 0 and example.right_choice == 0
    prompts = {choice.input_ids[: choice.prompt_length] for choice in example.choices}
    assert prompts == {example.input_ids[: example.prompt_length]}
    assert max(len(choice.input_ids) for choice in example.choices) <= 48
    alone = encode_rows(
        [Row(instruction="Say.", input=long.input, output="no")],
        tokenizer=tokenizer,
        template="plain",
        max_length=48,
    )[0][0]
    assert alone.prompt_length > example.prompt_length, "the control: 'no' alone leaves more room"


def test_a_row_of_which_one_choice_does_not_fit_is_dropped(tokenizer):
    rows = [Row(instruction="Say.", output="no", choices=("no", "never " * 40))]
    assert encode_rows(rows, tokenizer=tokenizer, template="plain", max_length=32) == ([], 1)


def test_rows_without_choices_have_the_digest_that_they_had():
    """A run from before choices goes on: a field that no row has is in no digest."""
    plain = [Row(instruction="a", output="b")]
    before = rows_digests({"c": {"train": plain}})["train"]
    assert before == "1 rows, 93a494ca0db5bcb8f562a2338e106c5d"
    scored = [Row(instruction="a", output="b", choices=("b", "c"))]
    assert rows_digests({"c": {"train": scored}})["train"] != before
