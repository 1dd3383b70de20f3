"""A crash may cut the last line short; a line that is whole and unreadable is never passed over."""

from __future__ import annotations

import json

import pytest

from federation import small
from flexlora.errors import UserError
from flexlora.report.records import read_run
from flexlora.runs.folder import RunFolder
from flexlora.runs.metrics_file import missing_files, read_rounds

ROUNDS = [{"round": number, "seconds": 1.5} for number in range(3)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROUNDS)


def test_cut_at_any_byte_the_whole_rounds_are_left(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for length in range(len(TEXT) + 1):
        file.write_text(TEXT[:length])
        whole = sum(length >= len(TEXT) // 3 * (n + 1) - 1 for n in range(3))
        assert read_rounds(file) == ROUNDS[:whole]


@pytest.mark.parametrize("odd", ["\x00\x00garbage", "[1]", '{"round": "1"}', "", '{"round": 1'])
def test_a_damaged_line_is_told_and_nothing_after_it_is_lost(tmp_path, odd):
    run = RunFolder.create(tmp_path / "run", small())
    lines = TEXT.splitlines()
    lines[1] = odd
    (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    before = (run.path / "metrics.jsonl").read_bytes()
    for read in (run.metrics, lambda: run.rewind(2), lambda: read_run(run.path)):
        with pytest.raises(UserError, match="damaged in line 2 of 3"):
            read()
    assert (run.path / "metrics.jsonl").read_bytes() == before


def test_what_a_folder_lacks_is_named(tmp_path):
    assert missing_files(tmp_path) == "no config.toml and environment.json"
    (tmp_path / "config.toml").touch()
    assert missing_files(tmp_path) == "no environment.json"
    (tmp_path / "environment.json").touch()
    assert missing_files(tmp_path) == ""


def test_no_file_is_no_round(tmp_path):
    assert read_rounds(tmp_path / "metrics.jsonl") == []
