"""The commands: what they print, what they leave, and that nothing leaves the machine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from federation import as_sets, command, finished, small, state_delta
from flexlora import load_adapter
from flexlora.aggregation.engine.options import choices
from flexlora.commands.cli import main
from flexlora.config.paths import EMBEDDED
from flexlora.config.resolve import KEYS, all_keys
from flexlora.runs.checkpoints import load_checkpoint
from flexlora.simulations.simulate import simulate

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    simulate(small(num_server_rounds=2, eval__max_new_tokens=4), folder)
    return folder


def printed(arguments, capsys):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    return captured.out


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_help_names_the_commands_and_help_config_every_key_with_its_default(capsys):
    out = printed(["--help"], capsys)
    assert all(name in out for name in ("simulate", "eval", "export"))
    lines = printed(["simulate", "--help-config"], capsys).splitlines()
    listed = {line.split()[0]: line for line in lines}
    assert listed.keys() == all_keys().keys() and len(lines) == len(listed)
    for key, info in all_keys().items():
        default = str(info.default)
        default = default.lower() if isinstance(info.default, bool) else default
        assert default in listed[key] and info.description in listed[key]
        assert all(choice in listed[key] for choice in choices(info.annotation))


def test_the_help_of_a_command_is_plain_and_describes_arguments_options_and_defaults(capsys):
    text = printed(["export", "--help"], capsys)
    assert not re.search("[\x1b\\\\\u2500-\u257f]", text)
    for line in (
        "ADAPTER_OR_RUN +a PEFT or a run folder +\\[required]",
        "--out .*\\[required]",
        "--format .*default:\\s+portable",
    ):
        assert re.search(line, text), line
    assert text.count("a PEFT or a run folder") == 1


def test_no_command_at_all_prints_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "simulate" in capsys.readouterr().out


def table(text):
    """The rows of the first printed table by their first word."""
    lines = text.split("\n\n")[0].splitlines()
    rows = [line.split() for line in lines if re.match(r"\w+ +\d", line)]
    return {row[0]: [float(cell) for cell in row[1:]] for row in rows}


def test_eval_of_a_run_scores_the_base_and_every_rank_class_on_test_rows(run_folder, capsys):
    rows = table(printed(["eval", run_folder], capsys))
    assert list(rows) == ["base", "rank_2", "rank_4"]
    held_out = {row[-1] for row in rows.values()}
    assert len(held_out) == 1 and held_out.pop() > 4
    assert rows["rank_4"][0] < rows["base"][0]
    for *_, exact_match, rouge_l, _ in rows.values():
        assert 0 <= exact_match <= 1 and 0 <= rouge_l <= 1
    again = table(printed(["eval", run_folder / "adapters" / "rank_4"], capsys))
    assert again == {"base": rows["base"], "rank_4": rows["rank_4"]}


def test_eval_obeys_settings_that_happen_to_be_the_defaults(run_folder, capsys):
    every = table(printed(["eval", run_folder], capsys))["base"][-1]
    few = ["--set", f"eval.max-examples={KEYS['eval.max-examples'].default}"]
    other = ["--set", f"eval.split={KEYS['eval.split'].default}"]
    assert table(printed(["eval", run_folder, *few], capsys))["base"][-1] <= 32 < every
    assert table(printed(["eval", run_folder, *other], capsys))["base"][-1] != every


def test_eval_of_a_run_takes_another_data_folder(run_folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    row = '{"instruction": "Say yes.", "output": "yes", "client": "anna"}\n'
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(row * 3)
    rows = table(printed(["eval", run_folder, "--data", tmp_path / "data"], capsys))
    assert {row[-1] for row in rows.values()} == {3}


def test_a_peft_folder_is_read_as_such_wherever_it_lies(run_folder, tmp_path, capsys):
    """Another program's config.toml two folders up makes no run of it."""
    (tmp_path / "config.toml").write_text("[theirs]\ncolour = 'red'\n")
    folder = tmp_path / "models" / "mine"
    shutil.copytree(run_folder / "adapters" / "rank_4", folder)
    fewer = ["--set", "clients.count=2", "--set", "eval.max-examples=1"]
    fewer += ["--set", "eval.max-new-tokens=2", "--set", "engine.threads=1"]
    assert list(table(printed(["eval", folder, *fewer], capsys))) == ["base", "mine"]


@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_an_exported_adapter_is_the_best_approximation_of_its_rank(
    rank, run_folder, tmp_path, capsys
):
    """T_r(G) of the checkpoint by a dense SVD; beyond the rank of G it is G itself."""
    out = printed(["export", run_folder, "--rank", rank, "--out", tmp_path / "a"], capsys)
    state, _ = load_checkpoint(run_folder / "checkpoint")
    exported = load_adapter(tmp_path / "a")
    for name, delta in state_delta(state).items():
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert exported[name].rank == rank
        got = exported[name].delta_weight().double()
        assert (got - best).norm() <= 1e-5 * delta.norm()
    assert f"{tmp_path / 'a'}: rank {rank} of round 2" in out and "% of the energy" in out


def test_an_exported_adapter_loads_in_peft_with_our_logits(run_folder, tmp_path, capsys):
    printed(["export", run_folder, "--rank", 3, "--out", tmp_path / "a"], capsys)
    ours = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64)
    before = logits(ours)
    for name, factors in load_adapter(tmp_path / "a").items():
        ours.get_submodule(name).weight.data += factors.delta_weight().double()
    bare = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64)
    peft = logits(PeftModel.from_pretrained(bare, tmp_path / "a").double())
    assert (logits(ours) - before).abs().max() > 1e-2
    assert (peft - logits(ours)).abs().max() < 1e-4


def test_a_merged_export_is_the_base_with_the_change_in_it(run_folder, tmp_path, capsys):
    printed(["export", run_folder, "--rank", 4, "--out", tmp_path / "a"], capsys)
    merging = ["export", run_folder, "--rank", 4, "--format", "merged", "--out", tmp_path / "m"]
    printed(merging, capsys)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    bare = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64)
    difference = logits(merged) - logits(bare)
    peft = PeftModel.from_pretrained(bare, tmp_path / "a").double()
    assert difference.abs().max() > 1e-2
    assert (logits(merged) - logits(peft)).abs().max() < 1e-4
    assert not list((tmp_path / "m").glob("*.bin"))
    text = "Say yes."
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "m", EMBEDDED))
    assert ours(text).input_ids == theirs(text).input_ids


def test_after_a_merged_export_the_same_process_still_runs_on_the_base(
    run_folder, tmp_path, capsys
):
    before = printed(["eval", run_folder], capsys)
    merging = ["export", run_folder, "--rank", 4, "--format", "merged", "--out", tmp_path / "m"]
    printed(merging, capsys)
    assert printed(["eval", run_folder], capsys) == before


def test_importing_the_command_is_quick_and_loads_neither_torch_nor_flower():
    code = (
        "import sys, flexlora, flexlora.commands.cli\n"
        "heavy = {'torch', 'flwr', 'transformers', 'numpy', 'ray', 'rich'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 1.0


def test_a_whole_run_opens_no_connection(tmp_path, monkeypatch, capsys):
    """Not to a hub, not to a tracker: every address beyond this machine is refused and noted."""
    tried = []
    honest = socket.socket.connect

    def connect(self, address):
        inside = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        if not inside:
            tried.append(address)
            raise ConnectionRefusedError(f"no connection to {address} was asked for")
        return honest(self, address)

    def look_up(host, *rest, **options):
        tried.append(host)
        raise socket.gaierror(f"no look-up of {host} was asked for")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ConnectionRefusedError):  # the fence stands
        socket.socket().connect(("192.0.2.1", 80))
    tried.clear()
    printed(["simulate", *as_sets(small(seed=11)), "--out", tmp_path / "run"], capsys)
    printed(["eval", tmp_path / "run", "--set", "eval.max-new-tokens=2"], capsys)
    assert tried == []


@pytest.mark.slow
def test_in_a_pipe_there_is_no_bar_no_colour_and_whole_tables(tmp_path):
    sets = as_sets(small(num_server_rounds=2))
    folder = tmp_path / "/".join(["a-rather-long-name-for-a-folder"] * 4)
    status, out, errors = finished(command("simulate", *sets, "--out", folder))
    assert (status, errors) == (0, "")
    assert not re.search("[\x1b\r\u2501\u2588\u2026]", out)
    shown = [line.split() for line in out.splitlines()]
    for number in ("0", "1", "2"):
        assert any(words[:1] == [number] for words in shown), out
    for word in ("rank_2", "rank_4", "train loss", "eval loss", "seconds", f"Run folder: {folder}"):
        assert word in out
