"""A ServerApp that died: Flower starts it again, or a new ``flwr run`` goes on with its folder."""

from __future__ import annotations

import json
import shutil

import pytest
import tomli_w
from flwr.app import Context, MessageType, RecordDict
from flwr.common.config import fuse_dicts, parse_config_args

from federation import ROOT, Stopped, adapter_bytes, client_rows, rounds, small, untimed
from flexlora.commands.cli import main
from flexlora.config.resolve import Config, of_flower, read_toml
from flexlora.errors import UserError
from flexlora.runs.folder import RunFolder
from flexlora.server.app import app as server_app
from flexlora.server.resuming import destination_of
from flexlora.server.settings import check_config
from flexlora.simulations.engine.cohorts import CohortLimits
from flexlora.simulations.engine.grid import InProcessGrid
from flexlora.simulations.simulate import simulate
from spelled import of_names

CONFIG = small(num_server_rounds=3, method__name="residual", lora__dropout=0.1)
WORKER_CONFIG = CONFIG


class BreakingGrid(InProcessGrid):
    """Breaks off when the messages of one round, and kind, go out."""

    def __init__(self, worker, at=None, kind=MessageType.TRAIN):
        super().__init__(worker, limits=CohortLimits(clients=8), wire_dtype="float32")
        self.at, self.kind, self.origins = at, kind, set()

    def push_messages(self, messages):
        messages = list(messages)
        kinds = {(m.metadata.message_type, m.metadata.group_id) for m in messages}
        if (self.kind, str(self.at)) in kinds:
            raise Stopped
        jobs = [m.content["job"] for m in messages if "job" in m.content]
        self.origins |= {job["origin"] for job in jobs}
        return super().push_messages(messages)


def served(worker, config, *, run_id=7, at=None, kind=MessageType.TRAIN):
    """One ServerApp over a grid that breaks off at a round, or does not."""
    context = Context(
        run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config=config.flat()
    )
    grid = BreakingGrid(worker, at, kind)
    if at is None:
        server_app(grid, context)
    else:
        with pytest.raises(Stopped):
            server_app(grid, context)
    return grid.origins


@pytest.fixture(scope="module")
def whole(worker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    served(worker, CONFIG.with_values({"out": str(folder)}))
    return folder


@pytest.fixture(scope="module")
def broken(worker, tmp_path_factory):
    """A run that ended in its third round; copied, never used itself."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    served(worker, CONFIG.with_values({"out": str(folder)}), at=3)
    return folder


def assert_same_run(folder, whole):
    assert adapter_bytes(folder) == adapter_bytes(whole)
    assert untimed(rounds(folder)) == untimed(rounds(whole))
    assert untimed(client_rows(folder)) == untimed(client_rows(whole))
    assert (folder / "config.toml").read_bytes() == (whole / "config.toml").read_bytes()


def test_a_server_app_that_flower_starts_again_goes_on_by_itself(worker, whole, tmp_path):
    config = CONFIG.with_values({"out": str(tmp_path / "run")})
    served(worker, config, at=3)
    assert [row["round"] for row in rounds(tmp_path / "run")] == [0, 1, 2]
    served(worker, config)
    assert_same_run(tmp_path / "run", whole)


def test_the_folder_that_is_named_after_the_run_is_found_again(
    worker, whole, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    served(worker, CONFIG, run_id=41, at=2)
    served(worker, CONFIG, run_id=41)
    assert_same_run(tmp_path / "runs" / "41", whole)


def test_one_that_died_before_its_first_round_was_written_begins_anew(worker, whole, tmp_path):
    config = CONFIG.with_values({"out": str(tmp_path / "run")})
    served(worker, config, at=0, kind=MessageType.EVALUATE)
    assert (tmp_path / "run" / "config.toml").is_file()
    assert not (tmp_path / "run" / "checkpoint").exists()
    served(worker, config)
    assert_same_run(tmp_path / "run", whole)


def test_another_run_does_not_touch_the_folder(worker, broken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(broken, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="already holds a run"):
        served(worker, CONFIG.with_values({"out": str(folder)}), run_id=8)
    kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "live.json"}
    assert kept == {p: data for p, data in before.items() if p.name != "live.json"}


def resume_config(folder):
    """What Flower makes of ``--run-config FOLDER/resume.toml`` over the app's own table."""
    given = parse_config_args([str(folder / "resume.toml")])
    app = read_toml(ROOT / "pyproject.toml")
    table = {k: v for k, v in app.items() if k.startswith("tool.flwr.app.config.")}
    defaults = {k.removeprefix("tool.flwr.app.config."): v for k, v in table.items()}
    return Config.of(of_flower(fuse_dicts(defaults, given)))


def test_a_new_run_goes_on_with_the_file_that_the_run_left(worker, whole, tmp_path):
    config = CONFIG.with_values({"out": str(tmp_path / "run")})
    assert served(worker, config, at=3) == {"7"}
    again = resume_config(tmp_path / "run")
    assert again.resume == str((tmp_path / "run").resolve()) and again.out == ""
    served(worker, again, run_id=8, at=3)  # and dies once more, and is started again
    # Nodes go on with what they keep under the first run's number.
    assert served(worker, again, run_id=9) == {"7"}
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_may_be_given_more_rounds(worker, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    served(worker, resumed(folder, num_server_rounds=4, server__quorum=2), run_id=9)
    assert [row["round"] for row in rounds(folder)] == [0, 1, 2, 3, 4]
    kept = Config.resolve(file=folder / "config.toml")
    assert (kept.num_server_rounds, kept.server.quorum, kept.resume) == (4, 2, "")
    assert resume_config(folder).num_server_rounds == 4


def resumed(folder, **changes):
    return CONFIG.with_values(of_names(resume=str(folder), **changes))


REFUSED = {
    "another rate": (
        {"train__learning_rate": 0.5},
        r"train.learning-rate is 0.5, expected 0\.\d+ as in '.*run'.*'.*resume.toml' as the only",
    ),
    "another method": ({"method__name": "flexlora"}, r"method.name is 'flexlora', expected 'resid"),
    "fewer rounds": ({"num_server_rounds": 2}, r"num-server-rounds is 2, expected 3 as in"),
    "another seed": ({"seed": 5}, r"seed is 5, expected 0"),
    "another folder": ({"out": "elsewhere"}, r"and out is 'elsewhere', expected one of the two"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_clients_read_must_be_the_folders_own(kind, broken):
    changes, sentence = REFUSED[kind]
    with pytest.raises(UserError, match=sentence):
        destination_of(resumed(broken, **changes), 8)


def test_a_run_of_the_simulation_is_refused_with_a_file_to_copy(tmp_path):
    simulate(small(), tmp_path / "run")
    config = small(seed=3, resume=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"seed is 3, .* a copy of '.*config.toml' with resume = "):
        destination_of(config, 8)


def test_what_the_server_alone_reads_may_differ(broken):
    changes = {"server__late_rounds": 3, "server__resends": 0, "num_server_rounds": 9}
    to = destination_of(resumed(broken, **changes), 8)
    assert to.resume and not to.overwrite and to.folder == broken
    assert to.config.resume == "" and to.config.server.late_rounds == 3
    check_config(to.config)
    assert to.config.num_server_rounds == 9


def test_nothing_to_go_on_from_is_told(broken, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        destination_of(resumed(tmp_path / "none"), 8)
    shutil.copytree(broken, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    with pytest.raises(UserError, match="no round of this run was finished"):
        destination_of(resumed(tmp_path / "run"), 8)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"flower_run_id": "12"}'])
def test_a_folder_that_does_not_name_this_run_is_somebody_elses(text, broken, tmp_path):
    shutil.copytree(broken, tmp_path / "run")
    (tmp_path / "run" / "environment.json").write_text(text)
    to = destination_of(CONFIG.with_values({"out": str(tmp_path / "run")}), 7)
    assert not to.resume and not to.overwrite


def test_the_folder_names_its_run_and_keeps_what_else_it_knew(broken):
    environment = json.loads((broken / "environment.json").read_text())
    assert environment["flower_run_id"] == "7" and environment["versions"]["flwr"]
    assert read_toml(broken / "config.toml")["resume"] == ""


def test_the_simulation_has_its_own_word_for_it(broken, tmp_path, capsys):
    arguments = ["simulate", "--set", f"resume={broken}", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "use --resume DIR" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_known_of_the_clients_goes_on_too(worker, broken, tmp_path):
    """Back-off and sampling are in the checkpoint's notes."""
    shutil.copytree(broken, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    state, classes = run.load_checkpoint()
    notes = run.load_notes()
    notes["history"]["lost"] = {"client_01": [3, 2]}
    run.save_checkpoint(run.checkpoint, state, classes, notes)
    config = CONFIG.with_values({"fraction-train": 0.5, "out": str(tmp_path / "other")})
    changed = {**read_toml(tmp_path / "run" / "config.toml"), "fraction-train": 0.5}
    nested = {k: v for k, v in Config.of(changed).nested().items() if k != "out"}
    (tmp_path / "run" / "config.toml").write_text(tomli_w.dumps(nested))
    served(worker, config.with_values({"resume": str(tmp_path / "run"), "out": ""}), run_id=8)
    rows = {row["client_id"]: row for row in client_rows(tmp_path / "run", 3)}
    assert rows["client_01"]["status"] == "backing off"
    assert rows["client_01"]["cause"].startswith("sits out to round 6: lost 3 times in a row")
