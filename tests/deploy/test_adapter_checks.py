"""``flexlora doctor --adapter``: adapters that load and are wrong, each in one way."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import random_adapter
from flexlora import save_adapter
from flexlora.commands.cli import main
from flexlora.lora.adapters import Adapter
from flexlora.runs.sources import write_origin
from flexlora.training.models import load_base, resolve_name
from flexlora.training.slots import SlotModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter():
    shapes = SlotModel(load_base("embedded", fresh=True).model).shapes
    return random_adapter(shapes, 4, alpha=8.0, dtype=torch.float32)


@pytest.fixture
def folder(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "a", base=resolve_name("embedded"))
    return tmp_path / "a"


def change(folder, **fields):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def findings(folder, capsys, *more):
    status = main(["doctor", "--adapter", str(folder), "--format", "json", *more])
    found = json.loads(capsys.readouterr().out)
    assert status == int(any(f["status"] == "failed" for f in found["findings"]))
    return {f["name"]: f for f in found["findings"]}


def test_a_folder_of_ours_is_right_on_its_base_and_in_every_runtime(folder, capsys):
    found = findings(folder, capsys)
    assert {f["status"] for f in found.values()} == {"ok"}
    assert "modules of rank 4" in found["files"]["message"]
    assert "moves the logits of a sentence by up to" in found["base"]["message"]
    assert "PEFT 0.21, vLLM" in found["runtimes"]["message"]


def first(adapter):
    return next(iter(adapter))


def with_rank_pattern(folder, adapter):
    change(folder, r=2, rank_pattern=dict.fromkeys(adapter, 4))


def with_unequal_ranks(folder, adapter):
    lower = Adapter({**adapter, first(adapter): adapter[first(adapter)].terms([0, 1])})
    save_adapter(lower, folder, base=resolve_name("embedded"), layout="compact")


def with_alpha_pattern(folder, adapter):
    change(folder, alpha_pattern={first(adapter): 1})


def with_rslora(folder, adapter):
    change(folder, use_rslora=True)


def with_a_rank_too_high(folder, adapter):
    tensors = load_file(folder / WEIGHTS)
    for name in tensors:
        side = (0, 0, 0, 596) if "lora_A" in name else (0, 596)
        tensors[name] = torch.nn.functional.pad(tensors[name], side).contiguous()
    save_file(tensors, folder / WEIGHTS)
    change(folder, r=600, lora_alpha=600)


def with_zeros(folder, adapter):
    tensors = load_file(folder / WEIGHTS)
    zeroed = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}
    save_file(zeroed, folder / WEIGHTS)


def with_a_trained_head(folder, adapter):
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, folder / WEIGHTS)


def of_other_names(folder, adapter):
    other = Adapter({name.replace("model.", "transformer."): f for name, f in adapter.items()})
    save_adapter(other, folder, base="x")
    change(folder, base_model_name_or_path=resolve_name("embedded"))


def of_other_shapes(folder, adapter):
    name = first(adapter)
    wide = random_adapter({name: (64, 999)}, 4, dtype=torch.float32)
    save_adapter(Adapter({**adapter, **wide}), folder, base=resolve_name("embedded"))


def of_other_weights(folder, adapter):
    write_origin(folder, "0123456789ab" * 4)


@pytest.mark.parametrize(
    ("spoil", "name", "status", "words"),
    [
        (with_rank_pattern, "vLLM up to 0.31", "warning", "at 2 times its strength"),
        (with_unequal_ranks, "SGLang 0.5", "warning", "refuses ranks that differ, here 2 to 4"),
        (with_alpha_pattern, "llama.cpp", "warning", "at 4 times its strength"),
        (with_rslora, "llama.cpp", "warning", "at 0.5 times its strength"),
        (with_a_rank_too_high, "vLLM 0.32 and later", "warning", "up to 512, here 600"),
        (with_zeros, "files", "failed", "every lora_B is zero"),
        (with_zeros, "base", "failed", "the same with and without"),
        (with_a_trained_head, "files", "failed", "lm_head.weight', expected lora_A and lora_B"),
        (of_other_names, "base", "failed", "the base has no linear 'transformer."),
        (of_other_shapes, "base", "failed", r"the adapter's is (64, 999)"),
        (of_other_weights, "base", "failed", "has changed in weights"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_is_found_and_named(folder, adapter, capsys, spoil, name, status, words):
    spoil(folder, adapter)
    found = findings(folder, capsys)
    assert found[name]["status"] == status
    assert words in found[name]["message"], found[name]


@pytest.mark.parametrize(
    "spoil", [with_rank_pattern, with_unequal_ranks, with_alpha_pattern, with_rslora]
)
def test_the_remedy_makes_it_right(folder, adapter, capsys, spoil, tmp_path):
    spoil(folder, adapter)
    before = findings(folder, capsys)
    (remedy,) = {f["remedy"] for f in before.values() if f["status"] == "warning"}
    words = remedy.replace("NEW_FOLDER", str(tmp_path / "b")).split()
    assert words[0] == "flexlora" and main(words[1:]) == 0
    capsys.readouterr()
    after = findings(tmp_path / "b", capsys)
    assert {f["status"] for f in after.values()} == {"ok"}
    moved = [f["base"]["message"] for f in (before, after)]
    assert moved[0] == moved[1], "the same model"


def test_a_hub_name_is_not_fetched_unless_asked_for(folder, capsys):
    change(folder, base_model_name_or_path="owner/model")
    base = findings(folder, capsys)["base"]
    assert base["status"] == "warning" and "is no folder on this machine" in base["message"]
    assert "--base MODEL" in base["remedy"]
    assert findings(folder, capsys, "--base", "embedded")["base"]["status"] == "ok"


def test_a_folder_that_cannot_be_read_is_one_finding(tmp_path, capsys):
    found = findings(tmp_path, capsys)
    assert list(found) == ["files"] and found["files"]["status"] == "failed"
    assert "is it a PEFT folder?" in found["files"]["message"]


def test_a_folder_that_is_not_there_is_a_mistake_of_the_caller(tmp_path, capsys):
    assert main(["doctor", "--adapter", str(tmp_path / "nowhere")]) == 2
    assert "which is no folder, expected a PEFT folder" in capsys.readouterr().err
