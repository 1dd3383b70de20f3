"""``report-to``: every round reaches every tracker, and none can end or hold up a run."""

from __future__ import annotations

import inspect
import json
import struct
import sys
import threading
import time
from importlib.util import find_spec

import pytest

import tracker_fakes
from federation import small
from flexlora.commands.cli import main
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.runs.folder import RunFolder
from flexlora.runs.live_state import FAILED, FINISHED
from flexlora.server.observing import tracker_kinds
from flexlora.server.observing.observed import observed
from flexlora.server.observing.tracker_kinds import TRACKERS, check_trackers
from flexlora.server.observing.trackers import TrackerObserver, round_numbers
from flexlora.server.settings import check_config
from flexlora.simulations.simulate import simulate

ROUND = {"eval_loss": 2.5, "eval_loss/rank_2": 2.25, "bytes_up": 100, "seconds": 1.5}


def of_round(at, **more):
    return {"round": at, **ROUND, **more}


def delivered(name, folder, *rounds, state=FINISHED):
    """One process's part of a run: these rounds, then the end."""
    observer = TrackerObserver(name, folder, {"seed": 3, "data.path": "rows"})
    for at in rounds:
        observer.round_finished(of_round(at))
    observer.close(state)


@pytest.mark.parametrize("name", tracker_fakes.NAMES)
def test_a_round_is_sent_with_its_classes_and_the_configuration(name, tmp_path, monkeypatch):
    store = tracker_fakes.installed(monkeypatch, name)
    delivered(name, tmp_path, 0, 1)
    (run,) = store.runs.values()
    assert [step for step, _ in run["rows"]] == [0, 1]
    assert {**ROUND}.items() <= run["rows"][1][1].items()
    assert {k: str(v) for k, v in run["config"].items()} == {"seed": "3", "data.path": "rows"}
    assert run["ended"] in (0, "FINISHED", True)


@pytest.mark.parametrize("name", tracker_fakes.NAMES)
def test_a_resume_goes_on_with_the_same_run(name, tmp_path, monkeypatch):
    """Round 1 was sent, but its checkpoint was not written: the resume sends it again."""
    store = tracker_fakes.installed(monkeypatch, name)
    delivered(name, tmp_path, 0, 1, state=FAILED)
    delivered(name, tmp_path, 1, 2)
    ((_, run),) = store.runs.items()
    assert run["opened"] == 2 and run["rows"][-1][0] == 2
    assert len(run["config"]) == 2


def test_a_run_that_failed_is_marked_as_such(tmp_path, monkeypatch):
    store = tracker_fakes.installed(monkeypatch, "wandb", "mlflow")
    for name in ("wandb", "mlflow"):
        delivered(name, tmp_path, 0, state=FAILED)
    assert [run["ended"] for run in store.runs.values()] == [1, "FAILED"]


def test_what_a_dead_network_did_not_take_comes_later_in_order(tmp_path, monkeypatch, caplog):
    store = tracker_fakes.installed(monkeypatch, "mlflow")
    store.down = 2
    delivered("mlflow", tmp_path, 0, 1, 2)
    (run,) = store.runs.values()
    assert [step for step, _ in run["rows"]] == [0, 1, 2]
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "mlflow fails, and the run goes on" in said[0]
    assert "no route to host" in said[0] and store.attempts == 5


def test_a_tracker_that_hangs_neither_delays_a_round_nor_the_end(tmp_path, monkeypatch, caplog):
    released = threading.Event()

    class Hanging:
        def __init__(self, *_):
            released.wait()

    monkeypatch.setitem(TRACKERS, "wandb", Hanging)
    observer = TrackerObserver("wandb", tmp_path, {})
    began = time.monotonic()
    observer.round_finished(of_round(0))
    observer.close(FINISHED, seconds=0.05)
    assert time.monotonic() - began < 10
    released.set()
    assert "has not answered" in caplog.text


def test_a_simulation_whose_tracker_fails_is_whole_and_the_same(tmp_path, monkeypatch):
    store = tracker_fakes.installed(monkeypatch, "mlflow")
    store.down = 1000
    plain, reported = tmp_path / "plain", tmp_path / "reported"
    simulate(small(), plain)
    simulate(small(report_to="mlflow"), reported)
    files = sorted(f.relative_to(plain) for f in (plain / "adapters").rglob("*.safetensors"))
    assert files
    for file in files:
        assert (reported / file).read_bytes() == (plain / file).read_bytes()
    assert len(RunFolder(reported).metrics()) == 2 and store.attempts > 0


def test_an_interrupted_run_closes_its_trackers(tmp_path, monkeypatch):
    store = tracker_fakes.installed(monkeypatch, "mlflow")
    config = Config.of({"report-to": "mlflow"})
    with pytest.raises(KeyboardInterrupt), observed(tmp_path, config) as observer:
        observer.round_finished(of_round(0))
        raise KeyboardInterrupt
    assert [run["ended"] for run in store.runs.values()] == ["KILLED"]


def test_only_finite_numbers_are_sent():
    line = of_round(1, skipped="too few", train_loss=float("nan"), modules={"q": {}}, held=True)
    assert round_numbers(line) == {"round": 1.0, **ROUND}


def test_an_unknown_tracker_is_refused_with_the_nearest(capsys):
    assert main(["simulate", "--set", "report-to=tensorboard,mlfow", "--out", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert "report-to names 'mlfow'" in said and "Did you mean 'mlflow'?" in said


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow-skinny")],
)
def test_a_package_that_is_not_installed_is_refused_before_the_run(name, package, monkeypatch):
    monkeypatch.setattr(tracker_kinds, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"report-to names {name}.*`pip install {package}`"):
        check_config(Config.of({"report-to": name}))


def test_wandb_without_a_key_is_refused_unless_it_is_offline(monkeypatch):
    store = tracker_fakes.installed(monkeypatch, "wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    check_trackers("wandb")
    store.key = False
    with pytest.raises(UserError, match=r"no key on this machine; run `wandb login`.*offline"):
        check_trackers("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers("wandb")


def test_a_store_that_mlflow_cannot_open_is_refused(monkeypatch):
    tracker_fakes.installed(monkeypatch, "mlflow")

    def refuses():
        raise ValueError("The filesystem tracking backend is in maintenance mode.")

    monkeypatch.setattr(sys.modules["mlflow"], "MlflowClient", refuses)
    with pytest.raises(UserError, match=r"mlflow, which cannot use fake:store: .*maintenance mode"):
        check_trackers("mlflow")


def test_a_folder_that_is_written_anew_forgets_the_old_run(tmp_path, monkeypatch):
    tracker_fakes.installed(monkeypatch, "mlflow")
    config = Config.of({"engine.threads": 1})
    run = RunFolder.create(tmp_path / "run", config)
    delivered("mlflow", run.path, 0)
    assert json.loads((run.path / "trackers.json").read_text())["mlflow"]["at"] == "fake:store"
    RunFolder.create(run.path, config, overwrite=True)
    assert not (run.path / "trackers.json").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("name", tracker_fakes.NAMES)
def test_the_real_package_takes_a_run_and_its_resume(name, tmp_path, monkeypatch):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    check_trackers(name)
    delivered(name, tmp_path, 0, 1)
    delivered(name, tmp_path, 1, 2)
    assert READERS[name](tmp_path) == {0: 2.25, 1: 2.25, 2: 2.25}
    fakes = tracker_fakes.FAKES[name](tracker_fakes.Store())
    for module, members in CALLED[name].items():
        for member in members:
            fake, real = (_member(source, member) for source in (fakes[module], _real(module)))
            accepted = inspect.signature(real).parameters
            assert {*inspect.signature(fake).parameters} <= {*accepted} | {"self"}, member


CALLED = {
    "wandb": {"wandb": ("init", "login")},
    "mlflow": {
        "mlflow": [
            f"MlflowClient.{name}"
            for name in ("__init__", "create_run", "update_run", "log_batch", "set_terminated")
        ]
    },
    "tensorboard": {
        "torch.utils.tensorboard": [
            f"SummaryWriter.{name}" for name in ("__init__", "add_scalar", "add_text")
        ]
    },
}


def _real(module):
    return __import__(module, fromlist=["_"])


def _member(source, path):
    for name in path.split("."):
        source = getattr(source, name)
    return source


def _of_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert "config/text_summary" in events.Tags()["tensors"]
    return {event.step: round(event.value, 4) for event in events.Scalars("eval_loss/rank_2")}


def _of_mlflow(folder):
    import mlflow

    note = json.loads((folder / "trackers.json").read_text())["mlflow"]
    client = mlflow.MlflowClient()
    assert client.get_run(note["id"]).data.params["data.path"] == "rows"
    assert client.get_run(note["id"]).info.status == "FINISHED"
    history = client.get_metric_history(note["id"], "eval_loss/rank_2")
    return {metric.step: metric.value for metric in history}


def _of_wandb(folder):
    """From the file of an offline run: LevelDB's log format, here of one block."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, ids = {}, set()
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at = file.read_bytes(), 7
        ids.add(file.stem)
        while at + 7 <= len(data) < 32768:
            _, length, _ = struct.unpack_from("<IHB", data, at)
            record = Record.FromString(data[at + 7 : at + 7 + length])
            at += 7 + length
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): item.value_json for item in items}
            if "round" in row:
                found[int(float(row["round"]))] = float(row["eval_loss/rank_2"])
    assert len(ids) == 1, "the resume is another run"
    return found


READERS = {"tensorboard": _of_tensorboard, "mlflow": _of_mlflow, "wandb": _of_wandb}
