"""A damaged file in a run folder: each command reads it, or says in one sentence what is wrong."""

from __future__ import annotations

import random
import shutil

import pytest

from federation import small
from flexlora.clients import worker
from flexlora.commands.cli import main
from flexlora.simulations.simulate import simulate

FILES = (
    *("config.toml", "metrics.jsonl", "clients.csv", "evaluation.csv", "environment.json"),
    *("checkpoint/current.json", "checkpoint/round-000001.safetensors", "live.json"),
    *("adapters/rank_2/flexlora.json", "adapters/global/adapter_config.json"),
)
DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "a list": lambda data: b"[]\n",
    "a number": lambda data: b"7\n",
    "noise": lambda data: bytes(random.Random(0).randbytes(200)),
    "a flipped byte": lambda data: data[:40] + bytes([data[40] ^ 8]) + data[41:],
    "other text": lambda data: data.replace(b"rank", b"r\x00nk").replace(b"round", b"ronud"),
    "nested": lambda data: b"[" * 100_000,
    "other types": lambda data: data.replace(b'"format": 1', b'"format": "x"').replace(
        b": 2", b": {}"
    ),
}
COMMANDS = {
    "report": ["report", "run"],
    "compare": ["compare", "run", "whole"],
    "watch": ["watch", "run", "--once"],
    "export": ["export", "run", "--rank", "2", "--out", "out"],
    "resume": ["simulate", "--resume", "run"],
    "eval": ["eval", "run/adapters/rank_2"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = small(
        clients__count=2,
        train__max_steps=1,
        lora__target_modules="q_proj",
        eval__max_new_tokens=1,
    )
    folder = tmp_path_factory.mktemp("damaged") / "run"
    simulate(config, folder)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    for name in ("run", "whole"):
        shutil.copytree(made, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(arguments, capsys):
    """The status of a command, which has said at most one sentence on standard error."""
    status = main(arguments)
    lines = capsys.readouterr().err.splitlines()
    if status == 0:  # a run goes on without its page, or without what others read of it
        lines = [line for line in lines if "report was not written" not in line]
        lines = [line for line in lines if "live.json is not written" not in line]
    assert status in (0, 2) and len(lines) == (1 if status else 0), (arguments, status, lines)
    assert all(line.startswith("flexlora: ") for line in lines)
    return status


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_told_in_one_sentence(file, place, monkeypatch, capsys):
    """Also where the commands need not read the file."""
    monkeypatch.setattr("flexlora.simulations.inspection.cells_of", lambda *_, **__: [])
    whole, refused = (place / "run" / file).read_bytes(), 0
    for name, damage in DAMAGE.items():
        for command in COMMANDS.values():
            if command[1] == "--resume" and name not in ("half", "nested", "other text"):
                continue  # it takes longest
            (place / "run" / file).write_bytes(damage(whole))
            refused += outcome(command, capsys) == 2
            shutil.rmtree(place / "out", ignore_errors=True)
            if command[1] == "--resume":  # it writes what was damaged
                shutil.rmtree(place / "run")
                shutil.copytree(place / "whole", place / "run")
    assert refused or file == "live.json"


@pytest.mark.parametrize("file", FILES)
def test_a_folder_in_the_place_of_a_file_is_told(file, place, capsys):
    (place / "run" / file).unlink()
    (place / "run" / file).mkdir()
    for name in ("report", "watch", "export", "resume"):
        outcome(COMMANDS[name], capsys)
        shutil.rmtree(place / "out", ignore_errors=True)


def test_the_whole_run_is_read_by_all_of_them(place, monkeypatch, capsys):
    """The control."""
    worker._workers.clear()
    for command in COMMANDS.values():
        assert outcome(command, capsys) == 0
