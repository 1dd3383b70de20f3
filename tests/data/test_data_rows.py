"""Rows and their sources: what is accepted, and the one sentence that refuses the rest."""

import gzip
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flexlora.data.rows import Row, parse_row
from flexlora.data.sources import load_embedded, load_folder, load_hub
from flexlora.errors import UserError

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris"},
    ]
}


def write(folder, name, text):
    folder.mkdir(exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


def line(**row):
    return json.dumps(row)


def test_instruction_row_keeps_every_field():
    fields = {key: key.upper() for key in ("instruction", "input", "output")}
    fields |= {key: key.upper() for key in ("client", "task", "category")}
    assert parse_row(fields, "f line 1") == Row(**fields)


def test_absent_and_null_keys_are_the_same():
    row = parse_row({"output": "y", "input": None, "client": None, "messages": None}, "f line 1")
    assert row == Row(output="y") == parse_row({"output": "y"}, "f line 1")


def test_output_of_a_chat_row_is_its_last_message():
    row = parse_row({**CHAT, "task": "geo"}, "f line 1")
    assert row.output == "Paris" and row.task == "geo"
    assert row.messages[0] == ("system", "Be brief.") and len(row.messages) == 3
    assert (row.instruction, row.input) == ("", "")


def test_whole_numbers_name_clients_as_text():
    assert parse_row({"output": "y", "client": 17, "task": 0}, "f line 1").client == "17"


def test_keys_that_say_nothing_are_dropped():
    shown = {"id": 7, "source": "web", "prompt_id": "a1", "_id": "x", "meta": {"by": "me"}}
    empty = {"system": "", "history": [], "tools": "[]"[:0], "images": [], "note": None, "n": 3}
    assert parse_row({"output": "y", **shown, **empty}, "f line 1") == Row(output="y")


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([1], "found a list, expected one JSON object"),
        ("text", "found text, expected one JSON object"),
        (None, "found null, expected one JSON object"),
        ({}, r"has no output \(it has nothing\)"),
        ({"instruction": "do", "input": "x"}, r"has no output \(it has 'instruction', 'input'\)"),
        ({"output": None}, "has no output"),
        ({"output": ""}, "'output' is empty"),
        ({"output": " \n"}, "'output' is empty"),
        ({"output": 3}, "'output' is a number, expected text"),
        ({"output": ["a", "b"]}, "'output' is a list, expected text"),
        ({"output": "y", "input": {"a": 1}}, "'input' is an object, expected text"),
        ({"output": "y", "client": True}, "'client' is true or false, expected text"),
        ({"output": "y", "client": 1.5}, "'client' is a number, expected text"),
        ({"output": "y", "task": ""}, "'task' is empty, expected a name"),
        ({"output": "\ud83d"}, "half of a surrogate pair"),
        ({"output": "y", "inputs": "x"}, "unknown key 'inputs'.*Did you mean 'input'"),
        ({"ouput": "y"}, "unknown key 'ouput'.*Did you mean 'output'"),
        ({**CHAT, "output": "Paris"}, "both 'messages' and 'output'"),
        ({"messages": "hello"}, "'messages' is text, expected a list"),
        ({"messages": []}, "the roles none, expected at least one turn"),
        (chat(("assistant", "hi")), "the roles assistant, expected at least one turn"),
        (chat(("user", "a"), ("user", "b")), "the roles user, user, expected"),
        (chat(("user", "a"), ("assistant", " ")), "the assistant's with text"),
        (chat(("usr", "a"), ("assistant", "b")), "role 'usr'.*Did you mean 'user'"),
        (chat((7, "a"), ("assistant", "b")), "role 7, expected one of system"),
        (chat((["user"], "a"), ("assistant", "b")), "expected one of system"),
        (chat(("user", 5), ("assistant", "b")), "content of message 1 is a number"),
        ({"messages": [{"from": "human", "value": "a"}]}, "message 1 is not of the form"),
    ],
)
def test_rows_that_are_no_rows_are_refused_with_their_place(obj, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_row(obj, "train.jsonl line 12")
    assert str(caught.value).startswith("train.jsonl line 12: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_marks_blank_lines_and_crlf_change_nothing(tmp_path, name):
    plain = write(tmp_path / "a", name, line(output="é") + "\n" + line(output="b") + "\n")
    text = "\ufeff" + line(output="é") + "\r\n\r\n  \n\ufeff" + line(output="b")
    untidy = write(tmp_path / "b", name, text)
    assert (
        load_folder(plain) == load_folder(untidy) == {"train": [Row(output="é"), Row(output="b")]}
    )


def test_line_separators_inside_text_do_not_end_a_line(tmp_path):
    row = {"output": "one\u2028two\x85three\nfour"}
    write(tmp_path, "train.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    assert load_folder(tmp_path)["train"] == [Row(**row)]


def test_splits_come_in_order_and_only_those_that_exist(tmp_path):
    write(tmp_path, "test.jsonl.gz", line(output="c"))
    write(tmp_path, "train.jsonl", line(output="a"))
    splits = load_folder(str(tmp_path))
    assert list(splits) == ["train", "test"] and splits["test"] == [Row(output="c")]


def test_errors_count_blank_lines_and_name_the_file(tmp_path):
    write(tmp_path, "train.jsonl", line(output="a") + "\n\n" + line(input="no output"))
    with pytest.raises(UserError, match=r"train\.jsonl line 3: the row has no output"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds nothing, expected train.jsonl"),
        ({"validation.jsonl": line(output="a")}, "holds validation.jsonl, expected train.jsonl"),
        ({"train.jsonl": ""}, "train.jsonl holds no rows"),
        ({"train.jsonl": "", "train.jsonl.gz": ""}, "both train.jsonl and train.jsonl.gz"),
        ({"train.jsonl": '{"output": "a"'}, "line 1: not JSON"),
        ({"train.jsonl": "[" * 100_000}, "line 1: not JSON"),
        ({"train.jsonl": '[\n{"output": "a"}\n]'}, "line 1: not JSON"),
        ({"train.jsonl": line(output="é").encode("utf-16")}, "line 1: byte 1 is not UTF-8"),
    ],
)
def test_folders_that_cannot_be_read_are_refused(tmp_path, files, message):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, text in files.items():
        write(folder, name, text)
    with pytest.raises(UserError, match=message) as caught:
        load_folder(folder)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_file_in_its_place_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="does not exist, expected a folder"):
        load_folder(tmp_path / "nowhere")
    write(tmp_path, "train.jsonl", line(output="a"))
    with pytest.raises(UserError, match="is a file, expected a folder"):
        load_folder(tmp_path / "train.jsonl")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no gzip"])
def test_damaged_gzip_is_refused(tmp_path, damage):
    data = gzip.compress("\n".join(line(output=str(i)) for i in range(500)).encode())
    (tmp_path / "train.jsonl.gz").write_bytes(damage(data))
    with pytest.raises(UserError, match=r"train.jsonl.gz cannot be read"):
        load_folder(tmp_path)


def test_hub_without_the_datasets_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the 'datasets' package"):
        load_hub("some/data")


def test_hub_rows_are_parsed_and_placed(monkeypatch):
    loaded = {"train": [{"output": "a", "id": 1}], "test": [{"output": "b"}], "extra": []}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name: loaded))
    assert load_hub("some/data") == {"train": [Row(output="a")], "test": [Row(output="b")]}
    loaded["test"] = [{"output": "b"}, {"text": "c"}]
    with pytest.raises(UserError, match="some/data test row 2: the row has no output"):
        load_hub("some/data")
    del loaded["train"]
    with pytest.raises(UserError, match="has the splits test, extra, expected 'train'"):
        load_hub("some/data")


def test_a_data_sets_own_code_is_not_run_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    seen = []

    def load_dataset(name):
        seen.append(os.environ["HF_DATASETS_TRUST_REMOTE_CODE"])
        return {"train": [{"output": "a"}]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    load_hub("some/data")
    assert seen == ["0"]


def test_hub_failures_become_one_sentence(monkeypatch):
    def absent(name):
        raise FileNotFoundError(f"Dataset '{name}' doesn't exist\nlong trace")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=absent))
    with pytest.raises(UserError, match="cannot be loaded from the hub") as caught:
        load_hub("no/such")
    assert "\n" not in str(caught.value)


def test_embedded_tasks_are_made_for_the_clients_and_seed_asked_for(monkeypatch):
    made = SimpleNamespace(embedded_rows=lambda *shown: {"train": list(shown)})
    monkeypatch.setitem(sys.modules, "flexlora.data.tasks", made)
    assert load_embedded(3, 7, "all") == {"train": [3, 7, "all"]}
    with pytest.raises(UserError, match=r"clients.count is 0, expected at least 1"):
        load_embedded(0, 7)


def test_rows_sources_and_partitions_import_no_torch():
    code = (
        "import sys, flexlora.data.rows, flexlora.data.sources, flexlora.data.partitions, "
        "flexlora.data.templates; "
        "print(sorted({'torch', 'transformers', 'flwr', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
