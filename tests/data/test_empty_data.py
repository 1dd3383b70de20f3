"""A node whose data folder is empty says so in a sentence, and costs the others nothing."""

from __future__ import annotations

import pytest

from federation import client_rows, federation, rounds
from flexlora.commands.cli import main
from packed import trained
from trainers import (
    NodesGrid,
    asked,
    cause_of,
    context_of,
    evaluate_message,
    query_message,
    resident,
    run_config,
    train_message,
    write_rows,
)


def empty(folder, kind):
    """A data folder that holds nothing, a file without a row, or other files."""
    folder.mkdir()
    if kind == "no rows":
        (folder / "train.jsonl").write_text("\n")
    if kind == "other files":
        (folder / "rows.csv").write_text("instruction,output\n")
    return folder


KINDS = {
    "nothing": "holds nothing, expected train.jsonl",
    "no rows": "holds no rows, expected at least one; add training rows.",
    "other files": "expected train.jsonl or train.jsonl.gz",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_over_it_does_not_start(kind, tmp_path, capsys):
    data = empty(tmp_path / "data", kind)
    here = ("--socket", tmp_path / "t.sock", "--state", tmp_path / "kept")
    given = ("client", "serve", "--model", "embedded", "--data", data, *here)
    assert main([str(word) for word in given]) == 2
    err = capsys.readouterr().err
    assert KINDS[kind] in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "t.sock").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_without_a_trainer_says_it_to_every_question(kind, tmp_path):
    config = run_config()
    here = context_of(config, data_path=str(empty(tmp_path / "data", kind)), client_id="bare")
    for message in (query_message(), train_message(config), evaluate_message(config)):
        content = asked(message, here)
        assert KINDS[kind] in cause_of(content) and not trained(content)


def test_the_run_goes_on_without_it_and_names_it(tmp_path):
    config = run_config(num_server_rounds=1)
    bare = {"data_path": str(empty(tmp_path / "bare", "nothing")), "client_id": "bare"}
    full = {"data_path": str(write_rows(tmp_path / "full")), "client_id": "full"}
    federation(NodesGrid(config, [bare, full]), config, tmp_path / "run")
    assert [row["round"] for row in rounds(tmp_path / "run")] == [0, 1]
    rows = {row["client_id"]: row for row in client_rows(tmp_path / "run")}
    assert rows["full"]["status"] == "ok"
    assert rows["bare"]["status"] == "left out" and KINDS["nothing"] in rows["bare"]["cause"]


def test_a_folder_that_is_emptied_under_a_running_trainer(tmp_path):
    """Neither the rows that are gone nor the replies that were made of them are used."""
    config, data = run_config(), write_rows(tmp_path / "data")
    with resident(data, tmp_path / "kept") as made:
        assert cause_of(made.ask(train_message(config), config)) == ""
        for file in data.iterdir():
            file.unlink()
        content = made.ask(train_message(config), config)
        assert KINDS["nothing"] in cause_of(content) and not trained(content)
        write_rows(tmp_path / "data")
        assert cause_of(made.ask(train_message(config), config)) == ""
