"""Bases from elsewhere on the command line: one line, status 2, no run, no code of theirs."""

import io
import json

import pytest
import torch

import bases
from command_line import refusal
from federation import as_sets, small
from flexlora.clients import worker
from flexlora.simulations.simulate import simulate
from flexlora.training import models

CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}


def with_code(folder):
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py"):
        (folder / name).write_text("raise SystemExit('the code of a folder was run')\n")
    return bases.configured(folder, model_type="my_llama", auto_map=CODE)


def encoder(folder):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 256}
    config = BertConfig(vocab_size=529, num_hidden_layers=1, num_attention_heads=4, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return bases.saved(folder, BertLMHeadModel(config))


def with_adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def interrupted(folder):
    def without_last_layer(tensors):
        return {name: x for name, x in tensors.items() if ".3." not in name}

    return bases.with_tensors(folder, without_last_layer)


def quantized(folder):
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return bases.configured(folder, quantization_config=method)


# What to do to a copy of the embedded base, the sentence, and whether config.json alone says it.
BASES = {
    "own code": (with_code, "brings code of its own", True),
    "an adapter": (with_adapter, "holds an adapter", True),
    "quantized": (quantized, "is quantized already", True),
    "interrupted": (interrupted, "lacks 'model.layers.3.input_layernorm.weight'", False),
}


@pytest.mark.parametrize("kind", BASES)
def test_every_command_refuses_it_in_one_line(kind, tmp_path, capfd, monkeypatch):
    change, sentence, by_config = BASES[kind]
    folder = change(bases.copied(tmp_path / "m"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    out = tmp_path / "out"
    named = ["--set", f"model.name={folder}"]
    lines = {refusal(["simulate", *as_sets(small()), *named, "--out", out], capfd)}
    assert not out.exists()
    if by_config:
        lines.add(refusal(["plan", "--model", folder, "--memory", "1GiB"], capfd))
    assert len(lines) == 1 and sentence in lines.pop()


def test_an_encoder_is_refused_in_one_line(tmp_path, capfd):
    named = ["--set", f"model.name={encoder(tmp_path / 'm')}"]
    sets = as_sets(small(lora__target_modules="all-linear"))
    line = refusal(["simulate", *sets, *named, "--out", tmp_path / "out"], capfd)
    assert "a token sees the tokens after it" in line and not (tmp_path / "out").exists()


def test_a_base_that_broke_after_the_run_is_refused_by_eval_export_and_resume(
    tmp_path, capfd, monkeypatch
):
    """The merged export reads the base with the same loader as training does."""
    folder, run = bases.copied(tmp_path / "m"), tmp_path / "run"
    simulate(small(model__name=str(folder)), run)
    interrupted(folder)
    monkeypatch.setattr(models, "_loaded", {})  # as in a process of its own
    monkeypatch.setattr(worker, "_workers", {})
    lines = {
        refusal(["eval", run], capfd),
        refusal(["eval", run / "adapters" / "rank_2"], capfd),
        refusal(["export", run, "--rank", 2, "--format", "merged", "--out", tmp_path / "x"], capfd),
        refusal(["simulate", "--resume", run], capfd),
    }
    assert len(lines) == 1 and "lacks 'model.layers.3" in lines.pop()
    assert not (tmp_path / "x").exists()
