"""A person's mistake gets one sentence on standard error, exit status 2 and no traceback."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from builders import random_adapter
from command_line import refusal
from federation import as_sets, command, finished, small
from flexlora.commands.cli import main
from flexlora.config.paths import EMBEDDED
from flexlora.lora.peft_folder import save_adapter
from flexlora.simulations.inspection import _target
from flexlora.simulations.simulate import simulate

GOOD_ROW = {"instruction": "Say yes.", "output": "yes", "client": "anna"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run of a second, to resume, evaluate, export and (not) overwrite."""
    folder = tmp_path_factory.mktemp("bad-input") / "run"
    simulate(small(), folder)
    return folder


def simulated(tmp_path, *sets):
    """``simulate`` with the small settings, then ``sets``."""
    words = [word for item in sets for word in ("--set", item)]
    return ["simulate", *as_sets(small()), *words, "--out", tmp_path / "out"]


def data_folder(folder, *lines):
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


KEYS = {
    "an unknown key": ("train.learning-rte=0.1", r"unknown key 'train.learning-rte'.*'train.learn"),
    "a known key elsewhere": ("learning-rate=0.1", r"'learning-rate'.*'train.learning-rate'"),
    "text for a whole number": ("num-server-rounds=many", r"is 'many', expected a whole number"),
    "a fraction for a whole number": ("clients.count=2.5", r"'2.5', expected a whole number"),
    "text for a number": ("lora.alpha=big", r"lora.alpha is 'big', expected a number"),
    "yes for true": ("lora.rslora=yes", r"lora.rslora is 'yes', expected true or false"),
    "NaN": ("train.learning-rate=nan", r"train.learning-rate is nan, expected"),
    "infinity": ("lora.alpha=inf", r"lora.alpha is inf, expected"),
    "no equals sign": ("seed", r"--set got 'seed', expected key=value"),
    "no rounds": ("num-server-rounds=0", r"num-server-rounds is 0, expected at least 1"),
    "a negative count": ("clients.count=-1", r"clients.count is -1, expected at least 0"),
    "more than all": ("fraction-train=1.5", r"fraction-train is 1.5, expected at most 1"),
    "a quorum of more than all": (
        "server.quorum=100",
        r"server.quorum is 100, but the data makes \d+ clients, so that it can never be met",
    ),
    "more nodes than clients": (
        "server.min-nodes=50",
        r"server.min-nodes is 50, but the data makes \d+ clients",
    ),
    "an unknown choice": ("model.dtype=float16", r"'float16', expected one of float32.*Did you"),
    "an unknown method": ("method.name=flexlorra", r"'flexlorra' is unknown.*mean 'flexlora'"),
    "an option of another method": (
        "method.gradient-batches=2",
        r"gradient-batches is 2, which method.name=flexlora does not have \(but aligned does\)",
    ),
    "pruning where nobody prunes": (
        "method.prune-factor=0.5",
        r"method.prune-factor is 0.5, which .*flexlora does not have \(but hetlora does\); leave",
    ),
    "an unknown server optimizer": ("method.server-optimizer=adam", r"'adam', expected one of sgd"),
    "a base without a share": (
        "clients.quantization=nf4",
        r"'nf4' has no share, expected a name and a share",
    ),
    "a table of ranks that is not there": (
        "ranks.file=none.csv",
        r"ranks.file is 'none.csv', which ranks.policy=tiers does not read; set ranks.policy=file",
    ),
    "a policy that is none": ("ranks.policy=paper:nrmal", r"one of fixed.*mean 'paper:normal'"),
    "a server without a rank": ("method.server-max-rank=0", r"is 0, expected at least 1"),
    "a negative pull": ("train.proximal-mu=-1", r"train.proximal-mu is -1.0, expected at least 0"),
    "a negative server rate": ("method.server-learning-rate=-1", r"is -1.0, expected more than 0"),
    "an unknown policy": ("ranks.policy=tier", r"'tier', expected .*tiers.*Did you mean 'tiers'"),
    "rank 0 among the tiers": ("ranks.tiers=0,4", r"ranks.tiers has rank 0.*at least 1"),
    "a tier twice": ("ranks.tiers=4,4", r"names a rank twice"),
    "tiers that are text": ("ranks.tiers=small", r"'small', expected whole numbers"),
    "shares for other tiers": ("ranks.shares=0.2,0.3,0.5", r"3 shares for 2 tiers"),
    "shares beyond one": ("ranks.shares=0.9,0.9", r"adds up to 1.8, expected .* up to 1"),
    "negative shares": ("ranks.shares=-0.5,1.5", r"expected shares of at least 0"),
    "an unknown template": ("data.template=alpacca", r"alpacca.*Did you mean 'alpaca'"),
    "targets that match nothing": (
        "lora.target-modules=q_porj",
        r"'q_porj', which matches no linear .*Did you mean 'q_proj'",
    ),
    "a broken expression": ("lora.target-modules=q_proj(", r"neither a list .* nor a regular exp"),
    "a model path that is not there": ("model.name=./no/model", r"'./no/model', which is not a fo"),
    "a hub name that cannot be reached": ("model.name=nobody/nothing", r"'nobody/nothing' cannot "),
    "a data folder that is not there": ("data.path=./no/data", r"'./no/data' does not exist, exp"),
    "rows that are all too long": ("train.max-length=8", r"no client can train.*too long"),
}


@pytest.mark.parametrize("mistake", KEYS)
def test_a_mistaken_setting_is_told_in_one_sentence_and_leaves_no_folder(mistake, tmp_path, capsys):
    item, sentence = KEYS[mistake]
    assert re.search(sentence, refusal(simulated(tmp_path, item), capsys))
    assert not (tmp_path / "out").exists()  # so that the corrected command is not refused


def test_rank_0_for_all_is_refused(tmp_path, capsys):
    arguments = simulated(tmp_path, "ranks.policy=fixed", "ranks.fixed=0")
    assert re.search(r"ranks.fixed is 0, expected a rank of at least 1", refusal(arguments, capsys))


def test_a_folder_and_a_hub_data_set_at_once_are_refused(tmp_path, capsys):
    arguments = simulated(tmp_path, "data.path=here", "data.name=owner/rows")
    assert re.search("expected one of the two", refusal(arguments, capsys))


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (['{"instruction": "a", "input": "b", "client": "x"}'], r"line 2: the row has no output"),
        (['{"output": "yes", '], r"line 2: not JSON"),
        (['["output"]'], r"line 2: found a list, expected one JSON object"),
        (['{"output": 7, "client": "x"}'], r"line 2: 'output' is a number, expected text"),
        (["", '{"output": "", "client": "x"}'], r"line 3: 'output' is empty"),
        (['{"output": "yes"}'], r"1 of 2 train rows have no 'client'"),
    ],
)
def test_a_bad_row_is_told_with_its_file_and_line(lines, sentence, tmp_path, capsys):
    folder = data_folder(tmp_path / "data", json.dumps(GOOD_ROW), *lines)
    arguments = simulated(tmp_path, f"data.path={folder}", "clients.count=0")
    message = refusal(arguments, capsys)
    assert re.search(sentence, message)
    assert "line" not in sentence or f"{folder}/train.jsonl" in message


def test_a_data_folder_without_train_rows_is_refused(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "trian.jsonl").write_text("{}\n")
    message = refusal(simulated(tmp_path, f"data.path={tmp_path / 'data'}"), capsys)
    assert re.search(r"holds trian.jsonl, expected train.jsonl", message)


def broken_model(folder, kind):
    """A copy of the embedded base with one thing wrong."""
    shutil.copytree(EMBEDDED, folder)
    weights = folder / "model.safetensors"
    if kind == "without config.json":
        (folder / "config.json").unlink()
    elif kind == "without weights":
        weights.unlink()
    elif kind == "with weights cut short":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif kind == "with a config.json that is not JSON":
        (folder / "config.json").write_text("{")
    elif kind == "with a tokenizer.json that is not JSON":
        (folder / "tokenizer.json").write_text("{")
    elif kind == "of an unknown kind":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        "without config.json",
        "without weights",
        "with weights cut short",
        "with a config.json that is not JSON",
        "with a tokenizer.json that is not JSON",
    ],
)
def test_a_broken_model_folder_is_told_by_name(kind, tmp_path, capsys):
    folder = broken_model(tmp_path / "model", kind)
    assert str(folder) in refusal(simulated(tmp_path, f"model.name={folder}"), capsys)


def test_a_configuration_file_that_is_missing_or_broken_is_refused(tmp_path, capsys):
    assert re.search(
        "'none.toml' does not exist", refusal(["simulate", "--config", "none.toml"], capsys)
    )
    broken = tmp_path / "broken.toml"
    broken.write_text("seed = = 1\n")
    assert re.search("cannot be read", refusal(["simulate", "--config", broken], capsys))
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[train]\nmax-stesp = 3\n")
    assert re.search(
        r"'train.max-stesp'.*max-steps", refusal(["simulate", "--config", wrong], capsys)
    )
    wrong.write_text('[train]\nmax-steps = "3"\n')
    message = refusal(["simulate", "--config", wrong], capsys)
    assert re.search(r"train.max-steps is '3', expected a whole number", message)


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_is_replaced_only_when_asked(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    message = refusal(simulated(tmp_path), capsys)
    assert re.search(r"already holds a run; .*--resume .*--overwrite", message)
    assert refusal([*simulated(tmp_path, "ranks.tiers=0,1"), "--overwrite"], capsys)
    assert snapshot(tmp_path / "out") == before  # a mistake replaces nothing either
    arguments = [*simulated(tmp_path, "seed=5"), "--overwrite"]
    assert main([str(argument) for argument in arguments]) == 0
    after = snapshot(tmp_path / "out")
    page = tmp_path / "out" / "report.html"  # the command leaves one, the fixture's run none
    assert after.keys() - {page} == before.keys() and after != before
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("names", [["thesis.tex"], ["config.toml", "adapters/mine"]])
def test_a_folder_that_is_not_a_run_is_never_replaced(names, tmp_path, capsys):
    """Many programs have a config.toml: it alone makes no run."""
    for name in names:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("seed = 1\n")
    before = snapshot(tmp_path / "out")
    for flags in ([], ["--overwrite"]):
        message = refusal([*simulated(tmp_path), *flags], capsys)
        assert re.search("something that is not a run; give another --out", message)
    assert snapshot(tmp_path / "out") == before


def test_an_output_path_that_cannot_be_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        arguments = [*simulated(tmp_path)[:-1], out]
        assert re.search(
            r"output folder .*file.* (already holds|cannot)", refusal(arguments, capsys)
        )
    assert (tmp_path / "file").read_text() == ""


def test_resuming_what_is_no_run_is_refused(run_folder, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert re.search("is not a run folder", refusal(["simulate", "--resume", folder], capsys))
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    message = refusal(["simulate", "--resume", tmp_path / "run"], capsys)
    assert re.search("no round of this run was finished", message)


@pytest.mark.parametrize(
    "more", [["--set", "seed=1"], ["--out", "x"], ["--overwrite"], ["--config", "c.toml"]]
)
def test_resume_takes_no_other_settings(more, run_folder, capsys):
    message = refusal(["simulate", "--resume", run_folder, *more], capsys)
    assert re.search("--resume goes on with the run's own configuration", message)


COMMANDS = {
    "an unknown command": (["simulat"], r"simulat.*Did you mean 'simulate'"),
    "another unknown command": (["exprot"], r"exprot.*Did you mean 'export'"),
    "no command at all like it": (["frobnicate"], r"Expected one of simulate, .*tune.*reproduce\."),
    "a group without a command": (["client"], r"Expected one of init, .*health"),
    "a word too many": (["report", "x", "extra"], r"unexpected extra argument \(extra\)"),
    "an unknown flag": (["simulate", "--rezume", "x"], r"--rezume.*Did you mean '--resume'"),
    "a flag of another command": (
        ["eval", "x", "--superlink", "y"],
        r"No such option.*--superlink",
    ),
    "nothing to evaluate": (["eval"], r"ADAPTER_OR_RUN"),
    "no value": (["simulate", "--out"], r"'--out' requires an argument"),
    "a rank that is text": (["export", "x", "--rank", "z", "--out", "y"], r"--rank.*'z'"),
    "a missing path": (["eval", "./nothing-here"], r"'(./)?nothing-here' does not exist, expected"),
    "a folder of something else": (["eval", EMBEDDED], r"has no adapter_config.json"),
    "export of what is no run": (["export", EMBEDDED, "--rank", 2, "--out", "y"], r"not a run fo"),
}


@pytest.mark.parametrize("mistake", COMMANDS)
def test_a_mistaken_command_is_told_in_one_sentence(mistake, capsys):
    arguments, sentence = COMMANDS[mistake]
    message = refusal(arguments, capsys)
    assert re.search(sentence, message), message
    if "Did you mean" not in sentence:
        assert "Did you mean" not in message


def test_export_of_rank_0_or_an_unknown_format_or_onto_a_used_folder_is_refused(
    run_folder, tmp_path, capsys
):
    def export(rank, kind, out):
        return ["export", run_folder, "--rank", rank, "--format", kind, "--out", out]

    for rank in (0, -2):
        message = refusal(export(rank, "peft", tmp_path / "new"), capsys)
        assert re.search(f"--rank is {rank}, expected a rank of at least 1", message)
    message = refusal(export(2, "merge", tmp_path / "new"), capsys)
    assert re.search(
        r"'merge', expected portable, peft, merged, gguf or gguf-lora. Did you mean 'merged'",
        message,
    )
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("mine")
    message = refusal(export(2, "peft", tmp_path / "used"), capsys)
    assert re.search("already exists and is not empty", message)
    assert (tmp_path / "used" / "mine").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_merging_an_adapter_of_a_quantized_base_is_refused(run_folder, tmp_path, capsys):
    """Trap T14: merged into the full-precision base it is another model."""
    run = shutil.copytree(run_folder, tmp_path / "run")
    text = (run / "config.toml").read_text()
    assert text.count('quantization = "none"') == 1
    (run / "config.toml").write_text(text.replace('quantization = "none"', 'quantization = "nf4"'))
    merged = tmp_path / "merged"
    message = refusal(["export", run, "--rank", 2, "--format", "merged", "--out", merged], capsys)
    assert re.search("trained on a nf4 base.*another model.*--format portable", message)
    assert not merged.exists()


def test_evaluating_on_another_base_or_without_rows_is_refused(run_folder, tmp_path, capsys):
    adapter = run_folder / "adapters" / "rank_2"
    targets = ["--set", "lora.target-modules=k_proj"]
    message = refusal(["eval", adapter, "--set", "clients.count=2", *targets], capsys)
    assert re.search("does not fit the base", message)
    folder = data_folder(tmp_path / "data", json.dumps(GOOD_ROW))
    assert re.search("no test rows", refusal(["eval", adapter, "--data", folder], capsys))


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"revision": "v1.2"}, "made on revision 'v1.2' of 'x'.*--set model.name=FOLDER"),
        ({"base_model_name_or_path": 3}, "has base_model_name_or_path=3, expected a text"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': these factors belong to a"),
        ({"alora_invocation_tokens": [80]}, r"has alora_invocation_tokens=\[80\], expected None"),
        ({"a_newer_field": {"a": 1}}, "a_newer_field={'a': 1}, which FlexLoRA does not know"),
    ],
)
def test_an_adapter_from_elsewhere_that_belongs_to_another_model_is_refused(
    tmp_path, capsys, fields, pattern
):
    save_adapter(random_adapter({"q_proj": (8, 8)}, 2), tmp_path / "adapter", base="x")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    assert re.search(pattern, refusal(["eval", tmp_path / "adapter"], capsys))


def test_a_revision_of_the_base_does_not_matter_where_the_base_is_given(tmp_path):
    save_adapter(random_adapter({"q_proj": (8, 8)}, 2), tmp_path, base="x")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": "v1.2"}))
    assert _target(tmp_path, base_given=True).values["model.name"] == "x"


@pytest.mark.slow
def test_as_a_process_a_mistake_ends_with_status_2_and_one_line(tmp_path):
    other = broken_model(tmp_path / "model", "of an unknown kind")  # transformers warns of it too
    mistakes = {
        "unknown key 'sed'": ["simulate", "--set", "sed=1"],
        "has the model_type 'lama'": simulated(tmp_path, f"model.name={other}"),
    }
    running = {sentence: command(*arguments) for sentence, arguments in mistakes.items()}
    for sentence, process in running.items():
        status, out, errors = finished(process)
        assert (status, out) == (2, "")
        assert sentence in errors and errors.count("\n") == 1 and "Traceback" not in errors
