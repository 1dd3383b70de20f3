"""llama.cpp itself on our files: its logits are PEFT's, and wrong files are seen to be wrong.

``FLEXLORA_LLAMA_BASE=FOLDER`` takes another base than the embedded one.
"""

import os

import pytest
import torch

import llama
from builders import random_adapter
from flexlora.config.paths import resolve_name
from flexlora.deploy.gguf import adapter_file, architectures
from flexlora.deploy.gguf.metadata import Description
from flexlora.deploy.gguf.model_file import write_model
from flexlora.lora.adapters import Adapter
from flexlora.lora.peft_folder import load_adapter, save_adapter
from flexlora.simulations.exporting import export
from flexlora.training.models import load_base
from flexlora.training.targets import linear_shape
from small_tokenizers import byte_bpe

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")
pytestmark = pytest.mark.nightly

BASE = os.environ.get("FLEXLORA_LLAMA_BASE", "embedded")
TEXT = "Write the first letter of 'table' and don't count 123 words, über 漢字.\n  The end."
CLOSE, APART = 1e-3, 0.5  # largest difference of a logit; the adapter moves them by about 10


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The base as GGUF, a strong adapter of unequal ranks, its exports, ids, PEFT's logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("llama")
    base = load_base(BASE, device="cpu")
    modules = {name: linear_shape(module) for name, module in base.model.named_modules()}
    shapes = {n: s for n, s in modules.items() if s and n.endswith("_proj")}
    adapter = random_adapter(shapes, [2, 5, 8, 3], alpha=[4.0, 16.0, 9.0], dtype=torch.float32)
    about = Description(name="base", text="", license="", base="embedded")
    write_model(base.model, base.tokenizer, root / "base.gguf", numbers="f32", description=about)
    for layout in ("compact", "portable"):
        save_adapter(adapter, root / layout, base=resolve_name(BASE), layout=layout)
        export(str(root / layout), rank=None, kind="gguf-lora", out=str(root / f"{layout}-lora"))
    export(str(root / "compact"), rank=None, kind="gguf", out=str(root / "merged"))
    bare = AutoModelForCausalLM.from_pretrained(resolve_name(BASE), dtype=torch.float32)
    peft = PeftModel.from_pretrained(bare, root / "compact")
    return root, base, base.tokenizer(TEXT).input_ids, peft


def difference(made, adapter=None, model="base.gguf"):
    root, _, ids, peft = made
    opened = llama.open_model(root / model, adapter)
    return float((llama.logits(opened, ids) - llama.torch_logits(peft, ids)).abs().max())


@pytest.mark.parametrize("layout", ["compact", "portable"])
def test_the_base_with_the_adapter_file_is_peft(layout, made):
    root, _, ids, peft = made
    file = root / f"{layout}-lora" / "adapter.gguf"
    assert difference(made, file) < CLOSE and difference(made) > APART
    opened = llama.open_model(root / "base.gguf", file)
    assert llama.greedy(opened, ids, 16) == llama.torch_greedy(peft, ids, 16)


def test_the_merged_file_is_peft(made):
    root, _, ids, peft = made
    assert difference(made, model="merged/model.gguf") < CLOSE
    opened = llama.open_model(root / "merged" / "model.gguf")
    assert llama.greedy(opened, ids, 16) == llama.torch_greedy(peft, ids, 16)


def test_the_vocabulary_splits_as_the_base_does(made):
    root, base, _, _ = made
    ids = base.tokenizer(TEXT, add_special_tokens=False).input_ids
    opened = llama.open_model(root / "base.gguf")
    assert opened.tokenize(TEXT.encode(), add_bos=False, special=True) == ids
    assert opened.detokenize(ids).decode() == TEXT


def test_without_the_order_of_rows_the_logits_are_others(made, monkeypatch):
    root, *_ = made
    monkeypatch.setattr(architectures, "by_pairs", lambda rows, heads: rows)
    assert difference(made, written(made, load_adapter(root / "compact"), "unordered")) > APART


def test_with_alpha_doubled_the_logits_are_others(made):
    root, _, _, _ = made
    whole = load_adapter(root / "compact")
    double = Adapter(
        {
            name: type(factors)(
                lora_A=factors.lora_A, lora_B=factors.lora_B, alpha=2 * factors.alpha
            )
            for name, factors in whole.items()
        }
    )
    assert difference(made, written(made, double, "double")) > APART


def written(made, adapter, name):
    root, base, _, _ = made
    about = Description(name=name, text="", license="", base="embedded")
    file = root / f"{name}.gguf"
    config = base.model.config.to_dict()
    adapter_file.write_adapter(adapter, file, config=config, description=about)
    return file


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_every_family_is_computed_as_transformers_does(kind, tmp_path):
    """Random weights; the Llama with biases and llama3's frequencies."""
    import transformers

    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    more = {"Mistral": {"sliding_window": None}, "Llama": {"attention_bias": True}}.get(kind, {})
    more |= {"rope_parameters": rope} if kind == "Llama" else {}
    more |= {"head_dim": 32} if kind != "Qwen2" else {}
    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": 400, "max_position_embeddings": 256, "hidden_size": 64, **more},
        **{"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.dim() == 1 and not name.endswith("bias")
            parameter.uniform_(0.5, 1.5) if flat else parameter.normal_(std=0.15)
    tokenizer = byte_bpe(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<u>")
    about = Description(name=kind, text="", license="", base=kind)
    write_model(model, tokenizer, tmp_path / "m.gguf", numbers="f32", description=about)
    shapes = {n: linear_shape(m) for n, m in model.named_modules() if n.endswith("_proj")}
    adapter = random_adapter(shapes, [2, 5, 3], alpha=[4.0, 16.0], dtype=torch.float32)
    config = model.config.to_dict()
    adapter_file.write_adapter(adapter, tmp_path / "a.gguf", config=config, description=about)
    ids = list(range(5, 60))
    before = llama.torch_logits(model, ids)
    with torch.no_grad():
        for name, factors in adapter.items():
            model.get_submodule(name).weight.add_(factors.delta_weight())
    after = llama.torch_logits(model, ids)
    plain = llama.logits(llama.open_model(tmp_path / "m.gguf"), ids)
    adapted = llama.logits(llama.open_model(tmp_path / "m.gguf", tmp_path / "a.gguf"), ids)
    assert (plain - before).abs().max() < 1e-4 and (adapted - after).abs().max() < 1e-4
    assert (after - before).abs().max() > APART
