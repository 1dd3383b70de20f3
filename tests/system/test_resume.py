"""A run that is killed, interrupted or torn goes on to the bytes of the run that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest

from federation import (
    StopAt,
    Stopped,
    adapter_bytes,
    as_sets,
    client_rows,
    command,
    finished,
    rounds,
    same_bytes,
    small,
    state_delta,
    untimed,
)
from flexlora.commands.cli import main
from flexlora.errors import UserError
from flexlora.lora.peft_folder import load_adapter
from flexlora.runs.checkpoints import load_checkpoint, save_checkpoint
from flexlora.simulations.simulate import resume, simulate

STEADY = small(num_server_rounds=4, train__max_steps=4, lora__dropout=0.1, method__name="residual")
# Long enough rounds that the second is still going when the first is seen on disk.
LONG = STEADY.with_values({"train.max-steps": 16})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    simulate(STEADY, folder)
    return folder


def stopped(folder, event, server_round, error=Stopped):
    with pytest.raises(error):
        simulate(STEADY, folder, observer=StopAt(event, server_round, error))
    return folder


def assert_same_run(folder, whole):
    assert adapter_bytes(folder) == adapter_bytes(whole)
    assert untimed(rounds(folder)) == untimed(rounds(whole))
    assert untimed(client_rows(folder)) == untimed(client_rows(whole))
    first, second = (load_checkpoint(path / "checkpoint") for path in (folder, whole))
    assert first[0].round == second[0].round == 4 and first[1] == second[1]
    assert all(
        (first[0].change[name].U == second[0].change[name].U).all() for name in second[0].change
    )


@pytest.mark.parametrize(
    ("event", "server_round"),
    [("round_started", 1), ("replied", 2), ("round_finished", 2), ("replied", 4)],
)
def test_a_run_that_breaks_off_anywhere_goes_on_to_the_same_bytes(
    event, server_round, whole, tmp_path
):
    folder = stopped(tmp_path / "run", event, server_round)
    assert adapter_bytes(folder) != adapter_bytes(whole)
    resume(folder)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("method", ["aligned", "fedit", "flexlora"])
def test_every_method_goes_on_to_the_same_bytes(method, tmp_path):
    """Also those whose state is more than ``G``, or that draw anew in every round."""
    config = STEADY.with_values(
        {"method.name": method, "num-server-rounds": 3, "train.max-steps": 3}
    )
    simulate(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        simulate(config, tmp_path / "run", observer=StopAt("replied", 2))
    resume(tmp_path / "run")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert untimed(rounds(tmp_path / "run")) == untimed(rounds(tmp_path / "whole"))


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_run_that_breaks_off_leaves_the_adapters_of_its_last_whole_round(tmp_path):
    """Also when the sum of the next round is made already and only its evaluation is missing."""
    import flexlora.clients.worker as module

    evaluated = []
    honest = module.Worker.evaluate

    def evaluate(self, jobs):
        evaluated.append(jobs[0].server_round)
        if evaluated[-1] == 2:
            raise KeyboardInterrupt
        return honest(self, jobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Worker, "evaluate", evaluate)
        with pytest.raises(KeyboardInterrupt):
            simulate(STEADY, tmp_path / "run")
    assert [row["round"] for row in rounds(tmp_path / "run")] == [0, 1]
    state, _ = load_checkpoint(tmp_path / "run" / "checkpoint")
    saved = load_adapter(tmp_path / "run" / "adapters" / "global")
    assert state.round == 1
    for name, delta in state_delta(state).items():
        assert (saved[name].delta_weight().double() - delta).norm() <= 1e-5 * delta.norm()


def test_rows_after_the_checkpoint_are_forgotten(whole, tmp_path):
    """A crash between a round's rows and its checkpoint, and in the middle of a line."""
    folder = stopped(tmp_path / "run", "round_started", 3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**rounds(folder)[-1], "round": 3}) + '\n{"round": 4, "tr')
    last = (folder / "clients.csv").read_text().splitlines()[-1]
    with (folder / "clients.csv").open("a") as file:
        file.write("3" + last[1:] + "\n3,client_02,ra")
    with (folder / "evaluation.csv").open("a") as file:
        file.write("3,client_00,rank_2,1.0,,,1\n3,")
    resume(folder)
    assert_same_run(folder, whole)
    assert (folder / "evaluation.csv").read_bytes() == (whole / "evaluation.csv").read_bytes()


def cut_points(size):
    """Lengths to cut a file to: nothing, a byte, everywhere between, all but a byte."""
    return sorted({0, 1, 7, 8, 9, size // 4, size // 2, size - 8, size - 1})


def test_a_half_written_next_checkpoint_does_not_touch_the_last_one(whole, tmp_path):
    """What a crash leaves of ``write_atomically`` at any byte is a neighbour, never the file."""
    folder = stopped(tmp_path / "run", "round_started", 3)
    good = folder / "checkpoint"
    data = (whole / "checkpoint" / "round-000004.safetensors").read_bytes()
    index = (whole / "checkpoint" / "current.json").read_bytes()
    before = state_delta(load_checkpoint(good)[0])
    for size in cut_points(len(data)):
        (good / "round-000003.safetensors.partial").write_bytes(data[:size])
        state, _ = load_checkpoint(good)
        assert state.round == 2
        assert all((state_delta(state)[name] == before[name]).all() for name in before)
    (good / "round-000003.safetensors").write_bytes(data)  # renamed, but the index is the old one
    for size in cut_points(len(index)):
        (good / "current.json.partial").write_bytes(index[:size])
        assert load_checkpoint(good)[0].round == 2
    resume(folder)
    assert_same_run(folder, whole)
    states = [f"round-00000{at}.{kind}" for at in (2, 3, 4) for kind in ("json", "safetensors")]
    assert sorted(path.name for path in good.iterdir()) == sorted(["current.json", *states])


@pytest.mark.parametrize("step", range(7))
def test_a_crash_at_any_step_of_writing_leaves_a_whole_checkpoint(
    step, whole, tmp_path, monkeypatch
):
    """Power goes before one of the syncs or renames: the last checkpoint is there, or the next."""
    folder = stopped(tmp_path / "run", "round_started", 3)
    before, _ = load_checkpoint(folder / "checkpoint")
    after, classes = load_checkpoint(whole / "checkpoint")
    calls = []

    def crashing(honest):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) > step:
                raise Stopped
            return honest(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(f"flexlora.wire.files.os.{name}", crashing(getattr(os, name)))
        with pytest.raises(Stopped):
            save_checkpoint(folder / "checkpoint", after, classes, keep=3)
    assert same_bytes(load_checkpoint(folder / "checkpoint")[0], before)
    save_checkpoint(folder / "checkpoint", after, classes)
    assert same_bytes(load_checkpoint(folder / "checkpoint")[0], after)


def test_a_resumed_client_keeps_the_rank_class_that_it_had(tmp_path):
    """Classes come from the checkpoint: who joins or leaves meanwhile re-ranks nobody."""
    folder = stopped(tmp_path / "run", "round_started", 3)
    state, classes = load_checkpoint(folder / "checkpoint")
    names = sorted(classes)
    turned = {name: classes[names[-1 - at]] for at, name in enumerate(names)}
    if turned == classes:
        turned = {name: classes[names[at - 1]] for at, name in enumerate(names)}
    assert turned != classes
    save_checkpoint(folder / "checkpoint", state, turned)
    strategy = resume(folder)
    assert {k: member.rank_class for k, member in strategy.roster.members.items()} == turned


@pytest.mark.parametrize("name", ["round-000004.safetensors", "current.json"])
def test_a_checkpoint_that_is_damaged_at_any_byte_is_refused_in_one_sentence(
    name, whole, tmp_path, capsys
):
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint" / name
    data = file.read_bytes()
    torn = [data[:size] for size in cut_points(len(data))]
    flipped = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in (9, len(data) // 2)]
    if name == "current.json":
        # A flipped byte of text may be another good text; without its last newline it is whole.
        torn, flipped = torn[:-1], [b"null", b"[]", b"{}", data.replace(b'"round"', b'"runde"')]
    for broken in [*torn, *flipped]:
        file.write_bytes(broken)
        with pytest.raises(UserError, match="checkpoint") as refusal:
            load_checkpoint(file.parent)
        assert str(refusal.value).count("\n") == 0
    assert main(["simulate", "--resume", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "checkpoint" in errors
    file.write_bytes(data)
    assert load_checkpoint(file.parent)[0].round == 4


def test_a_checkpoint_whose_file_is_gone_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoint" / "round-000004.safetensors").unlink()
    with pytest.raises(UserError, match=r"damaged|missing|is not there"):
        resume(tmp_path / "run")


def stop_in_a_middle_round(folder, how):
    """Start the run as a process and send ``how`` when round 2 is going."""
    process = command("simulate", *as_sets(LONG), "--out", folder)
    index = folder / "checkpoint" / "current.json"
    deadline = time.monotonic() + 300
    try:
        while not (index.is_file() and json.loads(index.read_text())["round"] >= 1):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(how)
    except BaseException:
        process.kill()
        raise
    return process


@pytest.mark.slow
def test_sigkill_and_ctrl_c_in_a_middle_round_cost_that_round_only(tmp_path, capsys):
    """One process killed, one interrupted; both go on to the same bytes, in another."""
    killed, interrupted = tmp_path / "killed", tmp_path / "interrupted"
    first = stop_in_a_middle_round(killed, signal.SIGKILL)
    status, _, _ = finished(first)
    assert status == -signal.SIGKILL and not (killed / "adapters").exists()

    second = stop_in_a_middle_round(interrupted, signal.SIGINT)
    status, _, errors = finished(second)
    assert status == 130 and "Traceback" not in errors, (status, errors)
    done = [row["round"] for row in rounds(interrupted)]
    assert done and done[-1] < 4
    assert f"interrupted after round {done[-1]}" in errors and "--resume" in errors
    names = sorted(path.name for path in (interrupted / "adapters").iterdir())
    assert names == ["global", "rank_2", "rank_4"]
    for name in names:
        load_adapter(interrupted / "adapters" / name)

    whole = tmp_path / "whole"
    simulate(LONG, whole)
    for folder in (killed, interrupted):
        assert main(["simulate", "--resume", str(folder)]) == 0
        assert capsys.readouterr().err == ""
        assert_same_run(folder, whole)
