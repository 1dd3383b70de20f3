"""The cohort benchmark at its smallest: everybody's work is the same, is checked and printed."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from flexlora import UserError
from flexlora.data.collation import Example, collate
from flexlora.simulations.benchmarks import cohort, cohort_flat
from flexlora.simulations.benchmarks.cohort_peers import flower, loop, ours
from flexlora.simulations.benchmarks.cohort_peers.work import Stamps, Work, as_batch, what_came_back
from flexlora.simulations.benchmarks.cohort_rows import CohortRow
from flexlora.simulations.benchmarks.cohort_runs import Run, check, disagreement, programs
from flexlora.simulations.benchmarks.cohort_work import Size, prepare

SIZE = Size(clients=3, rounds=2, steps=2, batch_size=2, max_length=64, ranks=(2, 4))
PROGRAMS = {program.name: program for program in programs(2, workers=(1,))}
MAINS = {"loop": loop.main, "ours": ours.main}
SMALL = ["--clients", "2", "--rounds", "2", "--steps", "1", "--batch-size", "2", "--warmup", "1"]


def in_this_process(program, work, report):
    """What ``launch`` does, without a process: one thread, one worker."""
    began = time.time()
    MAINS[program.module]([work.folder, str(report), "--threads", "1"])
    made = json.loads(report.read_text())
    whole = time.time() - began
    return run_of(made, began=began, whole_seconds=whole)


def run_of(report, *, began=0.0, whole_seconds=1.0):
    return Run(
        began=began,
        whole_seconds=whole_seconds,
        stamps=tuple(report["stamps"]),
        cpu_stamps=tuple(report["cpu_stamps"]),
        report=report,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return prepare(SIZE, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def runs(work, tmp_path_factory):
    """One run of the loop and one of ours."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: in_this_process(PROGRAMS[name], work, folder / f"{name}.json")
        for name in ("loop", "ours-1")
    }


def test_every_batch_is_full_and_everybody_can_read_it(work):
    assert work.num_rounds == 2 and list(work.ranks.values()) == [2, 4, 2]
    for server_round in (1, 2):
        for name in work.clients:
            steps = work.batches(server_round, name)
            assert [len(rows) for rows in steps] == [2, 2]
            lengths = [(len(ids), prompt) for rows in steps for ids, prompt in rows]
            assert all(0 < prompt < length <= 64 for length, prompt in lengths)
            answers = sum(length - prompt for length, prompt in lengths)
            assert work.answer_tokens(server_round, name) == answers
    again = Work.read(work.folder)
    assert again.clients == work.clients and again.plan == work.plan
    assert again.batches(2, again.clients[0]) == again.batches(2, work.clients[0])
    for rank in (2, 4):
        start = work.start(rank)
        assert {tensor.shape[0] for name, tensor in start.items() if "lora_A" in name} == {rank}
        assert all(not bool(tensor.any()) for name, tensor in start.items() if "lora_B" in name)


def test_too_few_clients_with_full_batches_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has 0 clients with 800000 rows .* expected 3; lower --c"):
        prepare(replace(SIZE, steps=400000), tmp_path)


def test_a_stock_batch_is_our_batch_of_one_client(work):
    rows = work.batches(1, work.clients[1])[0]
    examples = [
        Example(input_ids=tuple(ids), prompt_length=prompt, prompt="", answer="")
        for ids, prompt in rows
    ]
    ours_made, theirs = collate([examples], pad_token_id=0), as_batch(rows)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, getattr(ours_made, name)), name


@pytest.mark.parametrize("name", ["loop", "ours-1"])
def test_all_the_work_is_done(work, runs, name):
    check(PROGRAMS[name], runs[name], work)


def test_the_loop_reaches_our_losses_and_other_batches_do_not(work, runs, tmp_path):
    """The oracle of the benchmark: PEFT and torch's AdamW, from the same start."""
    assert disagreement(runs["loop"], runs["ours-1"], work) < 1e-5
    first, *others = work.clients
    turned = [{**plan, first: [step[::-1][:1] for step in plan[first]]} for plan in work.plan]
    folder = tmp_path / "other"
    folder.mkdir()
    for rank in (2, 4):
        (folder / f"rank_{rank}").symlink_to(Path(work.folder) / f"rank_{rank}")
    other = replace(work, folder=str(folder), plan=turned)
    other.write()
    run = in_this_process(PROGRAMS["loop"], other, tmp_path / "other.json")
    check(PROGRAMS["loop"], run, other)
    assert disagreement(run, runs["ours-1"], work) > 10 * cohort.ALLOWED_ERROR
    with pytest.raises(RuntimeError, match=f"client {first}: 2 steps and .* expected 2 and"):
        check(PROGRAMS["loop"], run, work)
    assert others


def damaged(run, **changes):
    return replace(run, report={**run.report, **changes})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: {"trainings": t[:-1]}, "trained 5 times, expected 6"),
        (lambda t: {"trainings": [*t, t[0]]}, "trained 6 times, expected 6"),
        (lambda t: {"trainings": [{**t[0], "steps": 1}, *t[1:]]}, "1 steps and"),
        (lambda t: {"trainings": [{**t[0], "tokens": 1}, *t[1:]]}, "and 1 answer tokens"),
        (lambda t: {"finite": False}, "not finite or never moved"),
        (lambda t: {"moved": 0.0}, "not finite or never moved"),
    ],
)
def test_a_peer_that_does_less_is_refused(work, runs, damage, message):
    run = runs["loop"]
    with pytest.raises(RuntimeError, match=message):
        check(PROGRAMS["loop"], damaged(run, **damage(run.report["trainings"])), work)


def test_ours_is_refused_too_if_it_does_less(work, runs):
    run, program = runs["ours-1"], PROGRAMS["ours-1"]
    with pytest.raises(RuntimeError, match=r"counted \[3, 2\] clients"):
        check(program, damaged(run, trained=[3, 2]), work)
    with pytest.raises(RuntimeError, match="had 1 worker processes, expected 2"):
        check(program, damaged(run, workers=2), work)
    with pytest.raises(RuntimeError, match="loss did not move"):
        check(program, damaged(run, loss_after=run.report["loss_before"]), work)
    with pytest.raises(RuntimeError, match="ended 1 rounds"):
        check(program, replace(run, stamps=run.stamps[:-1]), work)


def test_what_came_back_sees_a_nan_and_factors_that_stayed(work):
    start = work.start(2)
    moved = {name: tensor + 0.5 for name, tensor in start.items()}
    assert what_came_back(work, {work.clients[0]: moved}) == {"finite": True, "moved": 0.5}
    assert what_came_back(work, {work.clients[0]: start})["moved"] == 0.0
    name = next(iter(start))
    spoilt = {**moved, name: torch.full_like(start[name], float("nan"))}
    assert not what_came_back(work, {work.clients[0]: spoilt})["finite"]
    with pytest.raises(RuntimeError, match="sent 1 arrays"):
        what_came_back(work, {work.clients[0]: {name: start[name]}})


def test_the_steady_rate_leaves_the_first_rounds_and_the_startup_out():
    report = {"stamps": (5.0, 15.0, 16.0, 17.0), "cpu_stamps": (1.0, 2.0, 6.0, 10.0)}
    run = run_of(report)
    assert run.startup_seconds == 5.0
    assert run.steady_rate(8, 1) == 8.0
    assert run.steady_rate(8, 0) == pytest.approx(8 * 3 / 12)
    assert run.steady_rate(8, 1, "cpu") == 2.0


def test_cpu_seconds_count_work_and_not_waiting():
    stamps = Stamps()
    stamps.mark()
    time.sleep(0.3)
    stamps.mark()
    while time.process_time() < stamps.cpu[0] + 0.3:
        torch.randn(100, 100).norm()
    stamps.mark()
    waited, worked = stamps.cpu[1] - stamps.cpu[0], stamps.cpu[2] - stamps.cpu[1]
    assert stamps.wall[1] - stamps.wall[0] >= 0.3 > 2 * waited
    assert worked > 0.2


def test_the_command_compares_prints_and_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cohort, "launch", in_this_process)
    file = tmp_path / "rows.json"
    arguments = ["--only", "loop", "--workers", "1", "--cores", "2", "--json", str(file)]
    made = cohort.main([*SMALL, *arguments])
    assert [row.name for row in made] == ["steady, ours-1 over loop", "whole, ours-1 over loop"]
    for row, written in zip(made, json.loads(file.read_text()), strict=True):
        assert {"name", "ratio", "target", "error"} <= written.keys()
        assert row.ratio > 0 and row.error <= row.allowed_error == cohort.ALLOWED_ERROR
    steady, whole = made
    assert steady.ratio == pytest.approx(steady.ours / steady.other)
    assert whole.ratio == pytest.approx(whole.other / whole.ours)
    printed = capsys.readouterr().out
    assert "PEFT loop, one process" in printed and "steady, ours-1 over loop" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "ray"], "--only got 'ray', expected some of flower, flower-cached, loop"),
        (["--warmup", "6"], "--warmup is 6, expected 0 to 5"),
        (["--flat", "--rounds", "2"], "--rounds is 2, expected more than 2"),
    ],
)
def test_a_mistake_is_told(arguments, message):
    with pytest.raises(UserError, match=message):
        cohort.main([*arguments, "--cores", "2"])


def test_a_row_is_met_by_its_ratio_and_its_error_together():
    good = {"name": "x", "ratio": 2.0, "target": 1.5, "error": 0.0, "allowed_error": 0.1}
    assert CohortRow(**good).met
    assert not CohortRow(**{**good, "ratio": 1.0}).met
    assert not CohortRow(**{**good, "error": 0.2}).met
    assert not CohortRow(**good, at_most=True).met
    assert CohortRow(**{**good, "ratio": 0.1, "target": 0.0}).met


def test_the_peak_of_this_process_is_what_the_kernel_says():
    before = cohort_flat.peak_megabytes()
    assert before >= psutil.Process().memory_info().rss / 1e6 * 0.9
    held = torch.ones(int(before * 1e6) // 4 + 25_000_000)  # beyond any peak so far
    assert cohort_flat.peak_megabytes() > before + 50
    assert held.numel()


@pytest.mark.slow
def test_memory_over_rounds_in_a_process_of_its_own(tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["--flat", "--population", "8", "--rounds", "3", "--json", str(file)]
    (row,) = cohort.main([*arguments, "--clients", "2", "--steps", "1", "--batch-size", "2"])
    assert row.at_most and row.name == "peak after round 3 over round 2, 8 clients"
    assert 1.0 <= row.ratio < 1.5 and row.ours > 100
    assert json.loads(file.read_text())[0]["unit"] == "MB"


@pytest.mark.slow
def test_processes_of_the_loop_do_the_same_work(work, runs, tmp_path):
    report = tmp_path / "two.json"
    loop.main([work.folder, str(report), "--processes", "2"])
    made = json.loads(report.read_text())
    run = run_of(made)
    check(PROGRAMS["loop-2"], run, work)
    assert disagreement(run, runs["ours-1"], work) < 1e-5


@pytest.mark.slow
@pytest.mark.nightly
def test_the_flower_peers_do_the_same_work_and_leave_no_process():
    made = cohort.main([*SMALL, "--only", "flower", "flower-cached", "--workers", "1"])
    assert len(made) == 4
    assert all(row.ratio > 0 and row.error <= row.allowed_error for row in made)
    with flower.superlink() as (environment, _):
        home = environment["FLWR_HOME"]
        assert flower.processes_of(home)
    assert not flower.processes_of(home) and not Path(home).exists()
