"""A disk without room costs the round in flight at most, and is reported in one sentence.

``/dev/full`` is Linux's disk without room: a file of the run is led there, and the write fails as
it does on a real one (ENOSPC). A limit on the size of files does it to a whole process.
"""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from federation import (
    adapter_bytes,
    as_sets,
    client_rows,
    command,
    finished,
    rounds,
    same_bytes,
    small,
    untimed,
)
from flexlora.commands.cli import main
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.peft_folder import save_adapter
from flexlora.runs.checkpoints import load_checkpoint
from flexlora.runs.folder import RunFolder
from flexlora.simulations.simulate import resume, simulate
from flexlora.wire.files import write_atomically
from trainers import resident, run_config, train_message, values_of, write_rows

FULL = Path("/dev/full")
CONFIG = small(num_server_rounds=3, lora__dropout=0.1, method__name="residual")
BETWEEN = 150_000  # bytes: the state after round 1 is smaller, the one after round 2 is not
MEASURED = ("train-seconds", "free-bytes")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")


class FullAfter:
    """An observer that takes the room from one file of a run when a round has finished."""

    def __init__(self, file, server_round):
        self.file, self.server_round = file, server_round

    def __getattr__(self, name):
        return lambda *_: None

    def round_finished(self, metrics):
        if metrics["round"] == self.server_round:
            if self.file.exists():
                self.file.rename(aside(self.file))
            self.file.symlink_to(FULL)


def aside(file):
    return file.with_name(f"{file.name}.aside")


def room_again(file):
    """What stood in the file before its disk was full stands there again."""
    file.unlink(missing_ok=True)
    if aside(file).exists():
        aside(file).rename(file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run whose disk has room."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    simulate(CONFIG, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("clients.csv", "round 2"),
        ("metrics.jsonl", "round 2"),
        ("checkpoint/round-000002.safetensors.partial", "the state after round 2"),
        ("checkpoint/current.json.partial", "the state after round 2"),
    ],
)
def test_a_round_that_cannot_be_written_ends_the_run_and_loses_no_other(
    name, what, whole, tmp_path
):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=f"^{what} cannot be written to .*: No space left on"):
        simulate(CONFIG, folder, observer=FullAfter(folder / name, 1))
    state, _ = load_checkpoint(folder / "checkpoint")
    assert state.round == 1 and (folder / "adapters" / "global").is_dir()
    room_again(folder / name)
    resume(folder)
    assert same_bytes(*(load_checkpoint(path / "checkpoint")[0] for path in (folder, whole)))
    assert adapter_bytes(folder) == adapter_bytes(whole)
    assert untimed(rounds(folder)) == untimed(rounds(whole))
    assert untimed(client_rows(folder)) == untimed(client_rows(whole))
    assert list(folder.rglob("*.partial")) == []


@pytest.mark.slow
def test_the_command_says_so_in_one_sentence_and_goes_on_when_there_is_room(whole, tmp_path):
    """No file may grow beyond a limit: the process meets it as it would meet a full disk."""
    folder = tmp_path / "run"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (BETWEEN, BETWEEN))

    words = ("simulate", *as_sets(CONFIG), "--out", folder)
    status, _, err = finished(command(*words, preexec_fn=limited))
    printed = [line for line in err.splitlines() if line.startswith("flexlora: ")]
    assert status == 2 and "Traceback" not in err and len(printed) == 1, err
    assert "the state after round 2 cannot be written to" in printed[0]
    assert load_checkpoint(folder / "checkpoint")[0].round == 1
    assert main(["simulate", "--resume", str(folder)]) == 0
    assert adapter_bytes(folder) == adapter_bytes(whole)


@pytest.mark.parametrize("name", ["config.toml", "environment.json"])
def test_a_run_folder_that_cannot_be_begun_leaves_nothing_in_the_way(name, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    honest = RunFolder.check_free

    def fill(path, *, overwrite):
        honest(path, overwrite=overwrite)
        (path / f"{name}.partial").symlink_to(FULL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "check_free", staticmethod(fill))
        with pytest.raises(UserError, match="cannot be made: No space left on device"):
            RunFolder.create(folder, CONFIG)
    assert list(folder.iterdir()) == []
    RunFolder.create(folder, CONFIG)
    assert RunFolder.is_run(folder)


def test_nothing_half_written_stays_and_the_old_bytes_do(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, b"old")
    (tmp_path / "file.partial").symlink_to(FULL)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_trainer_without_room_still_answers_and_says_that_nothing_was_kept(tmp_path, monkeypatch):
    config, lines = run_config(), []
    with resident(write_rows(tmp_path / "data"), tmp_path / "kept") as made:
        monkeypatch.setattr(made.service.log, "line", lines.append)
        first = made.ask(train_message(config), config)
        (reply,) = (tmp_path / "kept").glob("*.reply")
        reply.unlink()
        partial = reply.with_name(f"{reply.name}.partial")
        partial.symlink_to(FULL)
        second = made.ask(train_message(config), config)
        assert not partial.is_symlink() and made.trainer.replies.usage() == (0, 0)
        third = made.ask(train_message(config), config)
        fourth = made.ask(train_message(config), config)
        assert (made.trainer.totals.trained, made.trainer.totals.from_disk) == (3, 1)
    answers = [values_of(content, without=MEASURED) for content in (first, second, third, fourth)]
    assert answers[0]["report/cause"] == "" and all(printed == answers[0] for printed in answers)
    kept = ["not kept: No space left on device" in line for line in lines]
    assert kept == [False, True, False, False], lines


@contextmanager
def no_file_beyond(size):
    """A limit on this process's files, for as long as the block lasts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_adapters_without_room_are_told_in_the_same_words(tmp_path):
    """safetensors writes files itself, and has an error of its own for a disk without room."""
    adapter = Adapter({"q": LoRAFactors(lora_A=torch.ones(2, 4), lora_B=torch.ones(4, 2), alpha=2)})
    run = RunFolder(tmp_path)
    printed = "^the adapters cannot be written to .*File too large.*; the rounds before are whole"
    with no_file_beyond(100), pytest.raises(UserError, match=printed), run.writing("the adapters"):
        save_adapter(adapter, tmp_path / "adapters" / "global", base="embedded")
