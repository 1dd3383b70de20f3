"""The follower against a Flower of the test's own: what it starts again, what it gives up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import replace

import pytest
import tomli_w
from test_schedule import at

from federation import small
from flexlora.commands.cli import main
from flexlora.config.resolve import Config, read_toml
from flexlora.errors import UserError
from flexlora.runs.folder import RunFolder
from flexlora.runs.live_state import FAILED, TRAINING, LiveState, process_space, write_live
from flexlora.runs.lock import only_one
from flexlora.server.following.flower_commands import FlowerCommands, NoAnswer
from flexlora.server.following.follower import Follower, Pace
from flexlora.server.following.place import Place, Standing
from flexlora.server.init import server_init
from flexlora.server.resuming import FINAL, settle
from init_folders import tree

FAST = Pace(look=0.001, ask=0.001, dead=0.05, first_pause=0.001, longest_pause=0.002, attempts=3)
KILLED = ("finished:failed", "Task failed with unknown error.")
DONE = ("finished:completed", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("server") / "server"
    server_init(folder=str(place), host=["localhost"], port=9092, proxy="none")
    return place


@pytest.fixture
def place(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "server")
    return Place.of(str(tmp_path / "server"))


class Flower:
    """Runs that end as a script says: ``(rounds that are there by then, status)`` each."""

    def __init__(self, place, *script):
        self.place, self.script = place, list(script)
        self.submitted, self.stopped, self.now = [], [], None

    def submit(self, run_config):
        values = read_toml(run_config)
        self.submitted.append(values)
        if isinstance(self.script[0], Exception):
            raise self.script.pop(0)
        rounds, self.now = self.script.pop(0)
        folder = values.get("resume") or values["out"]
        if rounds:
            finished(folder, rounds, len(self.submitted))
        return str(100 + len(self.submitted))

    def status(self, run_id):
        if isinstance(self.now, list):  # what is answered before the end
            answer = self.now.pop(0) if len(self.now) > 1 else self.now[0]
            if isinstance(answer, Exception):
                raise answer
            return answer
        return self.now

    def stop(self, run_id):
        self.stopped.append(run_id)


def finished(path, rounds, run_id):
    """A run folder that stands after ``rounds`` rounds, round 0 included."""
    config = small(num_server_rounds=8)
    run = RunFolder(path)
    if not RunFolder.is_run(run.path):
        run = RunFolder.create(path, config)
        settle(run, config, run_id)
    for server_round in range(len(run.metrics()), rounds):
        run.append_round({"round": server_round}, [], [])
    run.checkpoint.mkdir(exist_ok=True)
    (run.checkpoint / "current.json").write_text("{}")


def followed(place, *script, pace=FAST, **clock):
    said, flower = [], Flower(place, *script)
    follower = Follower(place, flower, said.append, pace=pace, **clock)
    return follower, flower, said


def test_a_run_that_finishes_is_submitted_once_into_a_folder_of_its_own(place):
    follower, flower, said = followed(place, (9, DONE))
    assert follower.run() == 0
    (values,) = flower.submitted
    assert values["out"] == str(place.state / "runs" / "app-0001") and "resume" not in values
    assert values["server.metrics-port"] == 0 and flower.stopped == []
    assert "finished" in said[-1] and follower.state == "idle"
    assert place.read_standing().open is False
    again, flower, _ = followed(place, (9, DONE))
    assert again.run() == 0, "the next command is the next run"
    assert flower.submitted[0]["out"].endswith("app-0002")


def test_a_run_whose_server_app_was_killed_goes_on_in_its_folder(place):
    follower, flower, said = followed(place, (3, KILLED), (5, KILLED), (9, DONE))
    assert follower.run() == 0
    first, second, third = flower.submitted
    assert first["out"] and not first.get("resume")
    for values in (second, third):
        assert values["resume"] == first["out"]
        assert values["train.learning-rate"] == small().train.learning_rate
    assert "ended after round 2 (Task failed" in "".join(said) and follower.starts == 3


def test_one_that_died_before_any_checkpoint_begins_anew(place):
    follower, flower, _ = followed(place, (0, KILLED), (9, DONE))
    assert follower.run() == 0
    assert [values.get("resume") for values in flower.submitted] == [None, None]
    assert len({values["out"] for values in flower.submitted}) == 1
    run = RunFolder(place.run_folder(2))
    follower, flower, _ = followed(place, (0, KILLED), (9, DONE))
    run.path.mkdir(parents=True)  # rows without a checkpoint
    assert follower.run() == 0
    assert flower.submitted[-1]["out"].endswith("app-0003")


def test_the_pauses_grow_are_bounded_and_start_over_with_a_new_round(place):
    pace = Pace(look=0.0, ask=0.0, first_pause=10.0, longest_pause=45.0, attempts=4)
    slept = []
    killed = [(0, KILLED)] * 3 + [(2, KILLED)] + [(2, KILLED)] * 4
    follower, flower, said = followed(place, *killed, pace=pace, sleep=slept.append)
    assert follower.run() == 1
    assert [s for s in slept if s] == [10.0, 20.0, 40.0, 10.0, 20.0, 40.0, 45.0]
    assert len(flower.submitted) == 8 and flower.script == []
    assert "failed 5 times without closing a round: Task failed" in said[-1]
    assert place.read_standing().failed == 1


def test_what_is_final_is_not_tried_again(place):
    cause = f"ServerApp failed with exception: {FINAL}no client was trained in 8 rounds."
    follower, flower, said = followed(place, (3, ("finished:failed", cause)))
    assert follower.run() == 1 and len(flower.submitted) == 1
    assert "failed: no client was trained in 8 rounds." in said[-1] and FINAL not in said[-1]


def test_a_run_that_somebody_stops_stays_stopped(place):
    follower, flower, said = followed(place, (3, ("finished:stopped", "")))
    assert follower.run() == 1 and len(flower.submitted) == 1
    assert "was stopped" in said[-1]


def test_a_superlink_that_is_away_is_waited_for_and_told_once(place):
    away = NoAnswer("connection refused")
    answers = [away, away, away, ("running", ""), DONE]
    follower, flower, said = followed(place, (9, answers))
    assert follower.run() == 0 and len(flower.submitted) == 1
    assert [line for line in said if "does not answer" in line] == [
        "the SuperLink does not answer (connection refused); asking on."
    ]
    follower, flower, said = followed(place, (3, [away] * 200 + [DONE]))
    after_submit(flower, pid=dead_process())
    assert follower.run() == 0 and flower.stopped == [], (
        "a server that is away gets no request to stop a run"
    )
    follower, flower, said = followed(place, away, (9, DONE))
    assert follower.run() == 0 and "connection refused" in "".join(said)


def test_a_database_that_was_lost_does_not_lose_the_run(place):
    follower, flower, _ = followed(place, (3, ("unknown", "not known")), (9, DONE))
    assert follower.run() == 0 and flower.submitted[1]["resume"]


def dead_process():
    done = subprocess.Popen([sys.executable, "-c", "pass"])
    done.wait()
    return done.pid


def after_submit(flower, **values):
    """Every run that is submitted finds, or writes, this ``live.json``."""
    honest = flower.submit
    values = {"state": TRAINING, "started": time.time() + 60, "host": process_space()} | values

    def submit(run_config):
        run_id = honest(run_config)
        last = flower.submitted[-1]
        write_live(RunFolder(last.get("resume") or last["out"]).path, LiveState(**values))
        return run_id

    flower.submit = submit


def test_a_server_app_that_is_gone_is_stopped_at_flowers_side(place):
    """Flower says that it runs: nobody there, or its last words were that it failed."""
    for live in ({"pid": dead_process()}, {"pid": os.getpid(), "state": FAILED}):
        follower, flower, _ = followed(place, (3, ("running", "")), (9, DONE))
        after_submit(flower, **live)
        assert follower.run() == 0
        assert len(flower.stopped) == 1 and len(flower.submitted) == 2


def test_a_live_file_of_the_process_before_says_nothing_of_this_one(place):
    follower, flower, _ = followed(place, (3, KILLED), (9, [("starting", "")] * 80 + [DONE]))
    after_submit(flower, pid=dead_process(), started=0.0)
    assert follower.run() == 0 and flower.stopped == []


def test_a_follower_that_was_killed_follows_its_run_again(place):
    follower, flower, _ = followed(place, (3, [("running", "")]))
    flower.status = lambda run_id: (_ for _ in ()).throw(KeyError("kill -9"))
    with pytest.raises(KeyError):
        follower.run()
    again, flower, _ = followed(place, (9, DONE))
    flower.now = DONE
    assert again.run() == 0
    assert flower.submitted == [], "no second run beside the first"
    assert place.read_standing().finished == 1


def test_ctrl_c_stops_the_run_and_the_next_command_goes_on_with_it(place):
    follower, flower, said = followed(place, (3, [KeyboardInterrupt()]))
    flower.status = lambda run_id: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        follower.run()
    follower.stop()
    assert flower.stopped == ["101"] and "goes on with it" in said[-1]
    again, flower, _ = followed(place, (9, DONE))
    assert again.run() == 0
    assert flower.submitted[0]["resume"].endswith("app-0001")


# The schedule


class Enough(Exception):
    """Ends a schedule that has no end."""


def scheduled(place, **table):
    file = place.app / "pyproject.toml"
    table = {"tool": {"flexlora": {"schedule": {k.replace("_", "-"): v for k, v in table.items()}}}}
    with file.open("a") as out:
        out.write("\n" + tomli_w.dumps(table))


def test_a_schedule_makes_a_new_folder_each_time_that_starts_from_the_last(place):
    scheduled(place, every="1h", start_from="adapter")
    moment = [at(9)]

    def sleep(seconds):
        moment[0] += 600.0

    clock = {"now": lambda: moment[0], "sleep": sleep}
    cause = ("finished:failed", f"{FINAL}no room on the disk.")
    follower, flower, said = followed(place, (9, DONE), (3, cause), (9, DONE), Enough(), **clock)
    with pytest.raises(Enough):
        follower.run()
    folders = [values["out"][-8:] for values in flower.submitted]
    assert folders == ["app-0001", "app-0002", "app-0003", "app-0004"]
    starts = [values.get("start-from", "")[-8:] for values in flower.submitted]
    assert starts == ["", "app-0001", "app-0001", "app-0003"], "from the last that finished"
    standing = place.read_standing()
    assert (standing.finished, standing.failed) == (2, 1)
    assert standing.planned == at(12) and len([s for s in said if "next run starts at" in s]) == 3


def test_a_federation_can_wait_for_another_ones_run(place):
    shutil.copytree(place.app, place.folder / "federations" / "north")
    north = Place.of(str(place.folder), "north")
    scheduled(place, after="north finished")
    looks = []

    class Watching(Follower):
        def _wait(self, condition, what):
            looks.append((condition(), what))
            north.write_standing(Standing(finished_at=time.time()))
            assert condition()

    follower = Watching(place, Flower(place, (9, DONE)), looks.append, pace=FAST)
    assert follower.run() == 0
    assert looks[0] == (False, "the next run starts once north has finished one")


# The folder and the command


def test_each_federation_has_its_own_app_folders_and_notes(place):
    shutil.copytree(place.app, place.folder / "federations" / "north")
    north = Place.of(str(place.folder), "north")
    assert north.app == place.folder / "federations" / "north"
    assert north.run_folder(1).name == "north-0001" and place.run_folder(1).name == "app-0001"
    follower, flower, _ = followed(north, (9, DONE))
    assert follower.run() == 0 and "north-0001" in flower.submitted[0]["out"]
    assert place.read_standing() == Standing()


def test_the_folder_asks_everybody_in_every_round(place):
    assert place.config().fraction_train == 1.0 != Config().fraction_train
    assert place.config() == Config().with_values({"fraction-train": 1.0})


def refused(capsys, *words):
    assert main(["server", "run", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.out == ""
    return said.err


def test_what_is_no_server_folder_is_refused_and_nothing_is_written(place, tmp_path, capsys):
    before = tree(place.folder)
    assert "has no environment and no flwr/config.toml" in refused(capsys, tmp_path)
    said = refused(capsys, place.folder, "nort")
    assert "has no federation 'nort', expected one of app." in said
    file = place.app / "pyproject.toml"
    table = tomllib.loads(file.read_text())
    config = table["tool"]["flwr"]["app"]["config"]
    for key, value, sentence in (
        ("out", "runs/1", "out is 'runs/1'"),
        ("seed", -1, "seed is -1"),
        ("sede", 1, "unknown key 'sede'. Did you mean 'seed'"),
    ):
        changed = config | {key: value}
        file.write_text(tomli_w.dumps({**table, "tool": {"flwr": {"app": {"config": changed}}}}))
        assert sentence in refused(capsys, place.folder)
    file.write_text(tomli_w.dumps(table))
    scheduled(place, every="often")
    assert "schedule.every is 'often'" in refused(capsys, place.folder)
    file.write_text(tomli_w.dumps(table))
    assert {k: v[0] for k, v in tree(place.folder).items() if "state/" not in k} == {
        k: (tomli_w.dumps(table).encode() if k == "app/pyproject.toml" else v[0])
        for k, v in before.items()
    }


def test_of_two_followers_of_a_federation_the_second_is_refused(place, capsys):
    with only_one(place.notes / "app.lock", "it"):
        assert "run by another process" in refused(capsys, place.folder)


def test_a_damaged_standing_is_one_sentence(place, capsys):
    place.notes.mkdir(parents=True)
    (place.notes / "app.json").write_text("{")
    assert "app.json' is damaged; remove it" in refused(capsys, place.folder)


RUNS = '[{{"run-id": "7", "status": "finished:failed", "status-details": "why"}}]'
FLWR = f"""#!/bin/sh
echo "$FLWR_HOME $*" >> {{log}}
case "$1" in
run) echo "Successfully started run 7"; echo '{{{{"success": true, "run-id": "7"}}}}' ;;
list) echo '{{{{"success": true, "runs": {RUNS}}}}}' ;;
*) echo '{{{{"success": false, "error-message": "no such run"}}}}'; exit 1 ;;
esac
"""


def test_flowers_commands_are_read_as_they_answer(place, tmp_path):
    log, programs = tmp_path / "log", tmp_path / "bin"
    programs.mkdir()
    (programs / "flwr").write_text(FLWR.format(log=log))
    (programs / "flwr").chmod(0o755)
    found = replace(place, environment={"PATH": f"{programs}:/usr/bin:/bin"})
    commands = FlowerCommands.of(found)
    assert commands.submit(tmp_path / "run.toml") == "7"
    assert commands.status("7") == ("finished:failed", "why")
    assert commands.status("8")[0] == "unknown"
    with pytest.raises(NoAnswer, match=r"^no such run$"):
        commands.stop("7")
    first = log.read_text().splitlines()[0].split()
    assert first[0] == str(place.notes / "flwr")
    assert first[1:4] == ["run", str(place.app), "flexlora"]
    with pytest.raises(UserError, match="no flwr in the PATH"):
        FlowerCommands.of(replace(place, environment={"PATH": str(tmp_path)}))


def test_the_standing_survives_as_it_was_written(place):
    standing = Standing(repetition=3, folder="x", run_id="7", open=True, planned=1.5)
    place.write_standing(standing)
    assert place.read_standing() == standing
    assert json.loads((place.notes / "app.json").read_text())["run_id"] == "7"
