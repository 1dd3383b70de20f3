"""Rows in the layouts of other tools: read whole, or refused by naming what would be lost."""

import pytest

from flexlora.data.rows import Row, parse_row
from flexlora.data.sources import load_folder
from flexlora.errors import UserError

ASKED, SAID = "What is the first colour?", "red"


def read(**row):
    return parse_row(row, "f line 1")


def chat(*turns):
    return Row(output=turns[-1][1], messages=turns)


def test_alpaca_with_system_and_history_is_a_conversation():
    row = read(
        instruction="And now?",
        input="Be quick.",
        output="blue",
        system="One colour.",
        history=[[ASKED, SAID]],
        client="c",
    )
    assert row.client == "c" and row.layout == "instruction, input, output, system, history"
    assert row.messages == (
        ("system", "One colour."),
        ("user", ASKED),
        ("assistant", SAID),
        ("user", "And now?\nBe quick."),
        ("assistant", "blue"),
    )
    assert read(instruction=ASKED, output=SAID, system="", history=[]) == Row(
        instruction=ASKED, output=SAID
    )


def test_dolly_and_pairs_are_instructions():
    dolly = read(instruction=ASKED, context="Red, blue.", response=SAID, category="open_qa")
    assert dolly == Row(instruction=ASKED, input="Red, blue.", output=SAID, category="open_qa")
    for question, answer in (("prompt", "completion"), ("question", "answer")):
        row = read(**{question: ASKED, answer: SAID, "id": "7"})
        assert row == Row(instruction=ASKED, output=SAID)
        assert row.layout == f"{question}, {answer}"


def test_sharegpt_and_conversational_pairs_are_chats():
    turns = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID, "weight": None}]
    expected = chat(("user", ASKED), ("assistant", SAID))
    assert read(conversations=turns, id="identity_0") == expected
    with_system = chat(("system", "Be brief."), *expected.messages)
    assert read(conversations=turns, system="Be brief.") == with_system
    first = {"from": "system", "value": "Be brief."}
    assert read(conversations=[first, *turns]) == with_system
    said = [{"role": "assistant", "content": SAID}]
    assert read(prompt=[{"role": "user", "content": ASKED}], completion=said) == expected


def test_openai_messages_with_empty_fields_and_parts():
    extra = {"refusal": None, "annotations": [], "tool_calls": None, "audio": None, "weight": 1}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": ASKED}]},
        {"role": "assistant", "content": SAID, **extra},
    ]
    expected = chat(("system", "Be brief."), ("user", ASKED), ("assistant", SAID))
    assert read(messages=messages, tools=[]) == expected
    # ultrachat_200k has the first question once more.
    assert read(messages=messages, prompt=ASKED, prompt_id="1f") == expected


def test_a_rendering_of_the_row_is_a_copy():
    text = f"Below is an instruction.\n{ASKED}\n### Response:\n{SAID}"
    assert read(instruction=ASKED, output=SAID, text=text) == Row(instruction=ASKED, output=SAID)
    with pytest.raises(UserError, match="'text' would be lost"):
        read(instruction=ASKED, output=SAID, text="Another story.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "output": "b"}, "'prompt' would be lost, .* beside 'output'"),
        ({"question": "a", "output": "b"}, "'question' would be lost"),
        ({"output": "b", "input": "x", "inputs": "z"}, "'inputs' would be lost.*mean 'instr|input"),
        ({"instruction": "a", "output": "b", "context": "c"}, "'context' would be lost"),
        ({"question": "a", "answer": "b", "context": "c"}, "'context' would be lost"),
        ({"instruction": "a", "output": "b", "tools": '[{"f": 1}]'}, "'tools' would be lost"),
        ({"instruction": "a", "output": "b", "images": ["cat.png"]}, "'images' would be lost"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "has no output"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label' would be lost"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "'history' is not a list of"),
        ({"instruction": "a", "output": "b", "history": "a"}, "'history' is not a list of"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function", "value": "b"},
                ]
            },
            "turn 2 of 'conversations' is from 'function'",
        ),
    ],
)
def test_what_would_be_lost_is_named(row, message):
    with pytest.raises(UserError, match=message) as caught:
        read(**row)
    assert str(caught.value).startswith("f line 1: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "f"}]}, "'tool_calls' would"),
        ({"role": "assistant", "content": "b", "reasoning_content": "c"}, "'reasoning_content'"),
        ({"role": "tool", "content": "b"}, "role 'tool', expected one of system"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "part of type 'image_url'"),
        ({"role": "assistant", "content": ["b"]}, "part of type 'text'"),
        ({"role": "assistant", "content": "b", "weight": 0}, "has the weight 0"),
    ],
)
def test_turns_that_are_more_than_text_are_refused(turn, message):
    with pytest.raises(UserError, match=message):
        read(messages=[{"role": "user", "content": "a"}, turn])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_files_in_another_encoding_are_refused(tmp_path, encoding):
    (tmp_path / "train.jsonl").write_bytes('{"output": "a"}\n'.encode(encoding))
    with pytest.raises(UserError, match=r"line 1: .*expected UTF-8 text"):
        load_folder(tmp_path)


@pytest.mark.parametrize("key", ["tags", "Tags", "task_id", "annotator", "subset", "session"])
def test_metadata_that_resembles_a_key_of_ours_is_dropped(key):
    """``tags`` is one letter from ``task``."""
    assert read(instruction=ASKED, output=SAID, **{key: "geography"}) == Row(
        instruction=ASKED, output=SAID
    )


def test_a_key_of_another_layout_is_not_called_a_misspelling():
    with pytest.raises(UserError, match="'prompt' would be lost") as refusal:
        read(prompt=ASKED, response=SAID)
    assert "Did you mean" not in str(refusal.value)
