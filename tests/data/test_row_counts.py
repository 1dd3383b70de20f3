"""One count of the rows that are trained on, after the length limit, wherever it is said."""

from __future__ import annotations

import json

import pytest

from federation import small
from flexlora.clients.setup.machine_plan import count_train_rows
from flexlora.clients.worker import Worker
from flexlora.data.clients import RowCount
from flexlora.data.sources import load_folder
from flexlora.errors import UserError

LONG = "a very long answer, word after word after word after word " * 12


def data(folder, *outputs):
    folder.mkdir()
    rows = ({"instruction": "Say it.", "output": text, "client": "a"} for text in outputs)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (
            RowCount(examples=328, dropped=304, max_length=256),
            "328 rows to train on; 304 do not fit in 256 tokens",
        ),
        (
            RowCount(examples=1, dropped=1, max_length=64),
            "1 row to train on; 1 does not fit in 64 tokens",
        ),
        (RowCount(examples=12, dropped=0, max_length=256), "12 rows to train on"),
        (RowCount(examples=3, dropped=2), "3 rows to train on; 2 do not fit in train.max-length"),
    ],
)
def test_both_numbers_are_said(count, words):
    assert str(count) == words


def test_init_counts_what_the_trainer_trains_on(tmp_path):
    folder = data(tmp_path / "d", "yes", LONG, "no", LONG, LONG)
    count = count_train_rows(load_folder(folder)["train"], model="embedded")
    assert (count.examples, count.dropped, count.max_length) == (2, 3, 256)
    worker = Worker(small(data__path=str(folder), clients__count=0, train__max_length=256))
    report = worker.capability("a", probed=False)
    assert (report.num_examples, report.num_dropped) == (count.examples, count.dropped)
    assert worker.data.count("a", "train") == count


def test_rows_that_are_all_too_long_are_refused_where_the_folder_is_made(tmp_path):
    rows = load_folder(data(tmp_path / "d", LONG, LONG))["train"]
    with pytest.raises(UserError, match="none of the 2 train rows fits in 256 tokens"):
        count_train_rows(rows, model="embedded")
