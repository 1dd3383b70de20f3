"""`flexlora serve` and `flexlora chat` as commands: what they take, print, refuse, answer."""

import json
import os
import re
import signal
import subprocess

import httpx
import pytest

from builders import random_adapter
from command_line import refusal
from federation import command, small
from flexlora.errors import UserError
from flexlora.lora.peft_folder import save_adapter
from flexlora.lora.runtimes import vllm_max_rank
from flexlora.runs.folder import RunFolder
from flexlora.serving.adapter_store import AdapterStore
from flexlora.simulations.served_adapters import FollowedRun
from flexlora.simulations.serving import Address, _poll, folders_of, vllm_command
from flexlora.simulations.serving_targets import (
    Target,
    open_served,
    serving_config,
    target_of,
)
from flexlora.simulations.simulate import simulate
from flexlora.training.models import load_base
from flexlora.training.targets import find_targets


@pytest.fixture(scope="module")
def config():
    return small(num_server_rounds=1)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A finished run of one round."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    simulate(config, folder)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A PEFT folder from elsewhere, of rank 20, on the embedded base."""
    folder = tmp_path_factory.mktemp("peft") / "foreign"
    shapes = find_targets(load_base("embedded", fresh=True).model, "all-linear")
    save_adapter(random_adapter(shapes, 20), folder, base="embedded")
    return folder


def test_a_target_is_a_folder_or_a_named_one(run, foreign, tmp_path):
    assert target_of(str(run)) == Target(path=run)
    assert target_of(f"mine={foreign}") == Target(path=foreign, name="mine")
    odd = tmp_path / "a=b"
    odd.symlink_to(foreign)
    assert target_of(str(odd)).adapter_name == "foreign"
    with pytest.raises(UserError, match="has no name before '='"):
        target_of(f"={foreign}")
    with pytest.raises(UserError, match="is no run folder and no PEFT folder"):
        target_of(str(tmp_path))


def test_a_run_and_a_folder_are_served_together(run, foreign):
    found = open_served([target_of(f"r={run}"), target_of(str(foreign))])
    assert found.base_name == "embedded" and found.prompts.template == "chat"
    assert {"foreign", "r/global", "r/rank_2", "r/rank_4"} <= set(found.store.names())
    with pytest.raises(UserError, match="two adapters are named 'rank_2'"):
        open_served([target_of(str(run)), target_of(str(run))])
    with pytest.raises(UserError, match="an adapter has the base's name 'embedded'"):
        open_served([target_of(f"embedded={foreign}")])


def test_the_base_and_the_template_are_the_run_s(run, config, foreign, tmp_path):
    assert serving_config([target_of(str(run / "adapters" / "rank_2"))]).model.name == "embedded"
    other = tmp_path / "other"
    RunFolder.create(other, config.with_values({"data.template": "alpaca"}))
    both = [target_of(str(run)), target_of(str(other))]
    assert serving_config(both[1:]).data.template == "alpaca"
    with pytest.raises(UserError, match=r"differ in data\.template: 'auto' in .* 'alpaca' in "):
        serving_config(both)
    assert serving_config(both, sets=["data.template=plain"]).data.template == "plain"
    with pytest.raises(UserError, match=r"--set seed: serving reads the keys of model, "):
        serving_config(both[:1], sets=["seed=1"])


def test_a_base_that_only_the_hub_has_is_not_fetched_unless_asked_for(foreign, tmp_path):
    folder = tmp_path / "theirs"
    folder.symlink_to(foreign)
    assert serving_config([target_of(str(folder))]).model.name
    copy = tmp_path / "copy"
    copy.mkdir()
    stored = json.loads((foreign / "adapter_config.json").read_text())
    stored["base_model_name_or_path"] = "owner/model"
    (copy / "adapter_config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"names the base 'owner/model'.*--base MODEL"):
        serving_config([target_of(str(copy))])
    assert serving_config([target_of(str(copy))], base="owner/model").model.name == "owner/model"


def test_the_command_for_vllm_names_the_folders_and_a_rank_that_it_takes(run, foreign):
    folders = folders_of([target_of(f"r={run}"), target_of(str(foreign))])
    assert set(folders) == {"foreign", "r/global", "r/rank_2", "r/rank_4"}
    words = vllm_command("embedded", {"foreign": foreign}).split()
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert words[-1] == f"foreign={foreign}" and words[:2] == ["vllm", "serve"]
    assert vllm_command("embedded", {}) == ""
    ranks = {1: 1, 2: 8, 8: 8, 9: 16, 128: 128, 129: 256, 257: 320, 321: 512, 513: None}
    assert {rank: vllm_max_rank(rank) for rank in ranks} == ranks


def test_other_machines_need_a_key():
    for host in ("0.0.0.0", "::", "10.1.2.3"):
        with pytest.raises(UserError, match="which other machines reach, and there is no key"):
            Address(host=host)
        assert "secret" not in repr(Address(host=host, api_key="secret"))


def test_mistakes_are_one_sentence(run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FLEXLORA_API_KEY", raising=False)
    cases = {
        ("serve",): "nothing to serve: give a run or a PEFT folder",
        ("serve", tmp_path / "none"): "is no run folder and no PEFT folder",
        ("serve", run, "--host", "0.0.0.0"): "there is no key; set FLEXLORA_API_KEY",
        ("serve", run, "--allow-loading", tmp_path / "none"): "which is no folder",
        ("serve", "--follow", tmp_path): "is no run folder",
        ("serve", run, "--timeout", 0): "--timeout is 0, expected a number of seconds",
        ("serve", run, "--grace", "nan"): "--grace is nan, expected",
        ("serve", run, "--max-running", 0): "max_running is 0, expected at least 1",
        ("serve", run, "--cache", 5): "--cache is '5', expected a number and a unit",
        ("serve", run, "--port", 70000): "--port is 70000",
        ("serve", run, "--prot", 1): "Did you mean '--port'?",
        ("chat", run, "--adapter", "rank_3"): "no adapter is named 'rank_3'. Did you mean 'rank",
        ("chat", tmp_path / "none"): "is no run folder and no PEFT folder",
        ("chat", run, "--temperature", -1): "temperature is -1.0",
    }
    for arguments, message in cases.items():
        assert message in refusal(arguments, capsys), arguments


def test_a_followed_run_is_read_again_until_it_can_be(run, config, tmp_path):
    """New rounds are said; what cannot be read is said once, and the last good round stays."""
    place, lines = tmp_path / "run", []
    place.symlink_to(RunFolder.create(tmp_path / "begun", config).path)
    store = AdapterStore(load_base("embedded", fresh=True))
    followed = FollowedRun(store, place)

    def moved_to(target, said=""):
        place.unlink()
        place.symlink_to(target)
        return _poll(followed, said, lines.append)

    assert _poll(followed, "", lines.append) == "" and store.names() == [] and lines == []
    assert moved_to(run) == "" and "rank_2" in store.names()
    said = moved_to(tmp_path / "gone")
    assert moved_to(tmp_path / "gone", said) == said
    assert [re.sub(r"^[\d:]+ ", "", line)[:7] for line in lines[:1]] == ["round 1"]
    assert len(lines) == 2 and "is not followed at the moment" in lines[1]
    assert "rank_2" in store.names()
    assert moved_to(run, said) == ""


def test_serve_answers_until_it_is_told_to_stop(run):
    """A process: what it prints is what a client needs; SIGTERM lets an answer end; status 0."""
    process = command("serve", run, "--port", 0, "--grace", 60)
    try:
        url = ""
        while not url:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            url = line.split()[1] if line.startswith("address") else ""
        tried, vllm = process.stdout.readline(), process.stdout.readline()
        assert tried.startswith("try       curl ") and vllm.startswith("vLLM      vllm serve ")
        shown = subprocess.run(
            ["bash", "-c", tried.split(maxsplit=1)[1]],
            capture_output=True,
            text=True,
            env={**os.environ, "no_proxy": "*"},
        )
        assert json.loads(shown.stdout)["model"] == "global"
        body = {"model": "rank_2", "prompt": [5] * 8, "max_tokens": 200, "temperature": 5.0}
        with httpx.Client(trust_env=False, timeout=60) as client, client.stream(
            "POST", f"{url}/completions", json={**body, "stream": True}
        ) as response:  # fmt: skip
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2] == "data: [DONE]"
        assert process.wait(60) == 0
        assert process.stdout.read().splitlines()[-1] == "stopped"
        assert process.stderr.read() == ""
    finally:
        process.kill()


def test_chat_without_a_terminal_answers_line_by_line(run):
    process = command("chat", run, "--max-tokens", 4, stdin=subprocess.PIPE)
    out, err = process.communicate("Hello\n/compare Hello\n/base\nHello\n", timeout=120)
    lines = out.splitlines()
    assert process.returncode == 0 and err == ""
    assert lines[1].startswith("embedded: ") and f"global: {lines[0]}" in out
    assert lines[-1] == lines[1].removeprefix("embedded: ")
