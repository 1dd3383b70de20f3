"""``server.publish``: where a finished run's adapters go, and that a failure ends no run."""

from __future__ import annotations

import json
import logging
import shutil

import fsspec
import pytest

from federation import StopAt, Stopped, adapter_bytes, small
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.lora.peft_folder import load_adapter
from flexlora.runs.audit_check import check_log
from flexlora.runs.folder import RunFolder
from flexlora.server.publishing import check_publish, publish
from flexlora.server.settings import check_config
from flexlora.simulations.simulate import resume, simulate

CONFIG = small(num_server_rounds=2, clients__count=2)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A run that publishes to a folder at its end."""
    place = tmp_path_factory.mktemp("publish")
    simulate(CONFIG.with_values({"server.publish": str(place / "shelf")}), place / "run")
    return place


@pytest.fixture
def run(published, tmp_path):
    return RunFolder(shutil.copytree(published / "run", tmp_path / "run"))


def below(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_finished_run_is_on_the_shelf_and_latest_names_it(published):
    shelf, run = published / "shelf", published / "run"
    latest = json.loads((shelf / "latest.json").read_text())
    assert latest["path"] == "run/round-000002" and latest["round"] == 2
    assert below(shelf / latest["path"] / "adapters") == adapter_bytes(run)
    load_adapter(shelf / latest["path"] / "adapters" / "rank_2")
    assert set(latest["files"]) == set(below(shelf / latest["path"]))
    last = json.loads((run / "audit.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "published" and last["to"] == f"{shelf}/run/round-000002"
    assert check_log(RunFolder(run)).problems == []


def test_a_run_that_breaks_off_publishes_nothing_until_it_is_over(tmp_path):
    config = CONFIG.with_values({"server.publish": (tmp_path / "shelf").as_uri()})
    with pytest.raises(Stopped):
        simulate(config, tmp_path / "run", observer=StopAt("round_started", 2))
    assert not (tmp_path / "shelf").exists()
    resume(tmp_path / "run")
    assert (tmp_path / "shelf" / "latest.json").is_file()


def test_a_store_that_is_no_disk(run):
    assert publish(run, "memory://shelf/a", 2) == "memory://shelf/a/run/round-000002"
    store = fsspec.filesystem("memory")
    latest = json.loads(store.cat_file("/shelf/a/latest.json"))
    name = f"/shelf/a/{latest['path']}/adapters/global/adapter_model.safetensors"
    there = (run.path / "adapters" / "global" / "adapter_model.safetensors").read_bytes()
    assert store.cat_file(name) == there


def test_latest_is_written_after_everything_that_it_names(run, monkeypatch):
    """Whoever follows it never reads half a folder, also if the store breaks in the middle."""
    memory = type(fsspec.filesystem("memory"))
    honest, puts = memory.put_file, []

    def breaking(self, source, target, **options):
        puts.append(target)
        if len(puts) > 3:
            raise OSError("the store is away")
        return honest(self, source, target, **options)

    monkeypatch.setattr(memory, "put_file", breaking)
    assert publish(run, "memory://broken", 2) == ""
    assert not fsspec.filesystem("memory").exists("/broken/latest.json")
    monkeypatch.undo()
    assert publish(run, "memory://broken", 2)


def test_a_failure_is_told_and_ends_no_run(published, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    config = CONFIG.with_values({"server.publish": str(tmp_path / "file" / "shelf")})
    with caplog.at_level(logging.WARNING):
        simulate(config, tmp_path / "run")
    assert "could not be published" in caplog.text and "stay in" in caplog.text
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(published / "run")
    assert check_log(RunFolder(tmp_path / "run")).problems == []


class Hub:
    """Hugging Face's hub as ``upload_folder`` is called: no connection is made."""

    def __init__(self, calls):
        self.calls = calls

    def upload_folder(self, **given):
        self.calls.append({**given, "files": below(given["folder_path"])})


def test_a_repository_of_the_hub_gets_one_commit(run, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(calls))
    assert publish(run, "hf://somebody/adapters/shelf", 2)
    (call,) = calls
    assert (call["repo_id"], call["path_in_repo"]) == ("somebody/adapters", "shelf")
    assert "run/round-000002/adapters/global/adapter_model.safetensors" in call["files"]
    assert json.loads(call["files"]["latest.json"])["path"] == "run/round-000002"


REFUSED = {
    "s3://bucket/path": "s3fs is not installed here; `pip install s3fs`",
    "gs://bucket": "gcsfs is not installed here",
    "sss://bucket": "'sss' is no protocol that fsspec knows",
    "hf://somebody": "expected hf://USER/REPO",
    "s3://key:secret@bucket/path": "a name or a password in its URL",
}


@pytest.mark.parametrize("url", REFUSED)
def test_a_place_that_cannot_be_one_is_refused_before_anything_runs(url):
    with pytest.raises(UserError, match=REFUSED[url]) as refusal:
        check_config(Config.of({"server.publish": url}))
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("url", ["", "shelf", "/srv/shelf", "file:///srv/shelf", "memory://x"])
def test_a_place_that_can_be_one_is_not(url):
    check_publish(url)
