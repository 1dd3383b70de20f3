"""The audit log: what it says of a run, and that every change in the folder is reported."""

from __future__ import annotations

import json
import shutil

import pytest

from federation import StopAt, Stopped, TamperingGrid, federation, small
from flexlora.clients.worker import worker_for
from flexlora.commands.cli import main
from flexlora.runs.audit import FIRST, AuditLog, line_digest
from flexlora.runs.audit_check import check_log
from flexlora.runs.checkpoints import checkpoint_digest
from flexlora.runs.folder import RunFolder
from flexlora.simulations.simulate import resume, simulate

CONFIG = small(num_server_rounds=2, clients__count=3, server__keep_checkpoints=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run in which one client's replies are not its own, and what honest clients sent."""
    folder = tmp_path_factory.mktemp("audit") / "run"
    worker = worker_for(CONFIG)

    def claiming(reply, message):
        reply.content["report"]["client-id"] = "another"
        return [reply]

    victim = sorted(worker.client_ids)[0]
    grid = TamperingGrid(worker, tamper=claiming, victims=[victim])
    federation(grid, CONFIG, folder)
    return folder, victim, worker


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run")


def lines(folder):
    return (folder / "audit.jsonl").read_bytes().splitlines()


def events(folder):
    return [json.loads(line) for line in lines(folder)]


def problems(folder, **more):
    return check_log(RunFolder(folder), **more).problems


def test_a_line_a_round_with_everybodys_part_and_the_checkpoint(made, capsys):
    folder, victim, worker = made
    rows = events(folder)
    assert [row["event"] for row in rows] == ["started", *["round"] * 3, "adapters"]
    previous = [FIRST, *map(line_digest, lines(folder))]
    assert [row["previous"] for row in rows] == previous[:-1]
    last = rows[3]
    assert (last["round"], last["checkpoint"]) == checkpoint_digest(folder / "checkpoint")
    assert last["base"] == worker.base.fingerprint and last["wire"] == "float32"
    parts = {part["client_id"]: part for part in last["clients"]}
    assert sorted(parts) == sorted(worker.client_ids)
    for client_id, part in parts.items():
        assert part["outcome"] == ("refused" if client_id == victim else "ok")
        assert part["weight"] == (0.0 if client_id == victim else 1.0)
        assert part["num_examples"] > 0 and len(part["update"]) == 64
    assert len({part["update"] for part in parts.values()}) == 3
    assert main(["audit", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"ok       5 lines; the last has the hash {previous[-1]}" in said
    assert main(["audit", str(folder), "--head", previous[2]]) == 0


def test_the_digest_is_that_of_the_update_that_came(tmp_path):
    """Of what reached the server, so that whoever has the update can show that it is this one."""
    worker = worker_for(CONFIG)
    grid = TamperingGrid(worker)
    federation(grid, CONFIG.with_values({"num-server-rounds": 1}), tmp_path / "run")
    digests = {name: sent.adapter.digest() for (_, name), sent in grid.updates.items()}
    parts = {part["client_id"]: part["update"] for part in events(tmp_path / "run")[2]["clients"]}
    assert parts == digests


def rewritten(folder, change):
    """The log with its lines changed by ``change``."""
    changed = change(lines(folder))
    (folder / "audit.jsonl").write_bytes(b"".join(line + b"\n" for line in changed))


def other(line, **values):
    return json.dumps({**json.loads(line), **values}).encode()


TAMPERED = {
    "a client's examples": lambda ls: [
        *ls[:2],
        ls[2].replace(b"num_examples", b"num_exampleS"),
        *ls[3:],
    ],
    "a line gone": lambda ls: [*ls[:2], *ls[3:]],
    "the first gone": lambda ls: ls[1:],
    "two swapped": lambda ls: [ls[0], ls[2], ls[1], *ls[3:]],
    "the last gone": lambda ls: ls[:-1],
    "the last round gone": lambda ls: ls[:-2],
    "all but the start gone": lambda ls: ls[:1],
    "one put in": lambda ls: [*ls[:3], other(ls[3], round=9), *ls[3:]],
    "the last changed": lambda ls: [*ls[:-1], other(ls[-1], files={})],
    "a line of nothing": lambda ls: [*ls[:2], b"nothing", *ls[3:]],
    "no line": lambda ls: [],
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_log_that_was_changed_is_told(kind, run, capsys):
    assert problems(run) == []
    rewritten(run, TAMPERED[kind])
    assert problems(run)
    assert main(["audit", str(run)]) == 1
    said = capsys.readouterr().out
    assert "PROBLEM" in said and "\nok" not in said


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("adapters/global/adapter_model.safetensors", "is not the file that the run wrote"),
        ("adapters/global/more.bin", "is not in the log"),
        ("checkpoint/round-000002.safetensors", "damaged"),
        ("checkpoint/round-000001.safetensors", "damaged"),
    ],
)
def test_a_file_that_was_replaced_is_told(path, sentence, run):
    with (run / path).open("ab") as file:
        file.write(b"x")
    assert any(sentence in problem for problem in problems(run))


def test_another_runs_whole_checkpoint_is_told(run, tmp_path):
    """Whole in itself, and not what this run wrote."""
    simulate(CONFIG.with_values({"seed": 1}), tmp_path / "other")
    shutil.rmtree(run / "checkpoint")
    shutil.copytree(tmp_path / "other" / "checkpoint", run / "checkpoint")
    found = problems(run)
    assert any("the checkpoint is of round 2" in problem for problem in found)
    assert any("kept checkpoint of round 1 is not the log's" in problem for problem in found)
    shutil.rmtree(run / "adapters")
    assert any("is gone" in problem for problem in problems(run))
    assert any("no line has the hash" in problem for problem in problems(run, head="0" * 64))


def test_a_resume_appends_and_a_torn_line_stays_in_the_chain(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        simulate(CONFIG, folder, observer=StopAt("round_started", 2))
    before = (folder / "audit.jsonl").read_bytes()
    torn = before + b'{"previous": "12'
    (folder / "audit.jsonl").write_bytes(torn)
    assert problems(folder) == [] and check_log(RunFolder(folder)).notes
    resume(folder)
    assert (folder / "audit.jsonl").read_bytes().startswith(torn + b"\n")
    assert problems(folder) == []
    after = [json.loads(line)["event"] for line in lines(folder)[-3:]]
    assert after == ["resumed", "round", "adapters"]


def test_a_run_killed_between_the_line_and_the_checkpoint_is_no_tampering(run):
    log = AuditLog(run / "audit.jsonl")
    log.append("round", round=3, checkpoint="0" * 64, clients=[])
    found = check_log(RunFolder(run))
    assert found.problems == [] and "stopped in between" in found.notes[0]


def test_a_run_without_a_log_is_one_sentence(run, capsys):
    (run / "audit.jsonl").unlink()
    assert main(["audit", str(run)]) == 2
    assert "has no audit.jsonl" in capsys.readouterr().err
