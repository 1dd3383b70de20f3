"""Exports for llama.cpp, read back by the ``gguf`` package and held against a slow reference."""

import shutil

import pytest
import torch

from bases import saved
from builders import random_adapter, tiny_model
from command_line import refusal
from flexlora.config.paths import EMBEDDED
from flexlora.deploy.gguf.architectures import by_pairs
from flexlora.deploy.gguf.model_file import llama3_factors
from flexlora.deploy.gguf.vocabulary import read_vocabulary
from flexlora.errors import UserError
from flexlora.lora.peft_folder import load_adapter, save_adapter
from flexlora.simulations.exporting import export
from flexlora.training.models import load_base
from flexlora.training.targets import linear_shape

gguf = pytest.importorskip("gguf")
HEADS = 4


def shapes_of(model):
    found = {name: linear_shape(module) for name, module in model.named_modules()}
    return {name: shape for name, shape in found.items() if name.endswith("_proj") and shape}


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    """Unequal ranks and scalings on all linears of the embedded base."""
    folder = tmp_path_factory.mktemp("gguf") / "a"
    shapes = shapes_of(load_base("embedded", device="cpu", fresh=True).model)
    ranks, alphas = [2, 5, 8, 3], [4.0, 16.0, 9.0]
    adapter = random_adapter(shapes, ranks, alpha=alphas, dtype=torch.float32)
    save_adapter(adapter, folder, base=str(EMBEDDED), layout="compact")
    return folder


def reader_of(file):
    reader = gguf.GGUFReader(file)
    tensors = {t.name: torch.from_numpy(t.data.copy()).double() for t in reader.tensors}
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


def slowly_by_pairs(rows, heads):
    """Row by row: of each head the i-th of the first half, then the i-th of the second."""
    size, moved = len(rows) // heads, []
    for head in range(heads):
        for i in range(size // 2):
            moved += [rows[head * size + i], rows[head * size + size // 2 + i]]
    return torch.stack(moved)


def test_an_adapter_file_holds_the_products_as_llama_cpp_computes_them(adapter_folder, tmp_path):
    export(str(adapter_folder), rank=None, kind="gguf-lora", out=str(tmp_path / "l"))
    fields, tensors = reader_of(tmp_path / "l" / "adapter.gguf")
    assert fields["general.architecture"] == "llama" and fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    names |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    adapter = load_adapter(adapter_folder)
    assert len(tensors) == 2 * len(adapter) == 2 * 4 * len(names)
    for name, factors in adapter.items():
        layer, _, leaf = name.removeprefix("model.layers.").partition(".")
        key = f"blk.{layer}.{names[leaf]}.weight"
        lora_a, lora_b = tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"]
        assert len(lora_a) == factors.rank
        expected = factors.delta_weight().double()
        if leaf in ("self_attn.q_proj", "self_attn.k_proj"):
            expected = slowly_by_pairs(expected, HEADS)
        got = fields["adapter.lora.alpha"] / len(lora_a) * lora_b @ lora_a
        assert (got - expected).norm() < 1e-5 * expected.norm()


def test_by_pairs_moves_rows_and_biases_alike_and_is_not_the_identity():
    rows = torch.arange(16.0)
    assert torch.equal(by_pairs(rows, 2), slowly_by_pairs(rows, 2))
    assert not torch.equal(by_pairs(rows, 2), rows)


@pytest.mark.parametrize("dtype, tolerance", [("f32", 1e-6), ("bf16", 8e-3), ("f16", 1e-3)])
def test_a_model_file_holds_the_merged_weights_and_the_vocabulary(
    dtype, tolerance, adapter_folder, tmp_path
):
    export(str(adapter_folder), rank=None, kind="gguf", out=str(tmp_path / "m"), dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "m" / "model.gguf")
    kinds = {t.tensor_type.name.lower() for t in reader.tensors if len(t.shape) == 2}
    assert kinds == {dtype}
    base, adapter = load_base("embedded", device="cpu", fresh=True), load_adapter(adapter_folder)
    name = "model.layers.1.self_attn.q_proj"
    merged = base.model.get_submodule(name).weight + adapter[name].delta_weight()
    stored = next(t for t in reader.tensors if t.name == "blk.1.attn_q.weight")
    got = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    assert (got - slowly_by_pairs(merged, HEADS)).norm() < tolerance * merged.norm()
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["llama.attention.head_count"] == HEADS and fields["llama.vocab_size"] == 529
    assert fields["tokenizer.ggml.model"] == "rwkv" and len(fields["tokenizer.ggml.tokens"]) == 529
    assert "output.weight" not in {t.name for t in reader.tensors}  # tied


def test_longest_match_over_a_text_is_the_embedded_tokenizer():
    """llama.cpp's ``rwkv`` in Python, on texts with contractions, digits and other scripts."""
    tokenizer = load_base("embedded", device="cpu", fresh=True).tokenizer
    vocabulary = read_vocabulary(tokenizer, 529)
    raw = [token.encode().decode("unicode_escape").encode("latin-1") for token in vocabulary.tokens]
    ids = {token: i for i, token in enumerate(raw) if vocabulary.types[i] == 1}
    for text in ("Don't take 'table' 's away,  the\n\n end 123", "über 漢字 it'the", "I'll 'The x"):
        data, found = text.encode(), []
        while data:
            longest = max((t for t in ids if data.startswith(t)), key=len)
            found.append(ids[longest])
            data = data[len(longest) :]
        assert found == tokenizer(text, add_special_tokens=False).input_ids


def test_frequency_factors_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(rope_parameters=rope, head_dim=64, max_position_embeddings=131072)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    ours = plain / llama3_factors(rope, 64)
    assert torch.allclose(ours, theirs.double(), rtol=1e-5)
    assert not torch.allclose(plain, theirs.double(), rtol=1e-1)


def test_another_architecture_is_refused_by_name(tmp_path):
    model = tiny_model("gpt2", dtype=torch.float32)
    base = saved(tmp_path / "base", model)
    name, shape = next(
        (n, s) for n, m in model.named_modules() if (s := linear_shape(m)) and "attn" in n
    )
    adapter = random_adapter({name: shape}, 2, dtype=torch.float32)
    save_adapter(adapter, tmp_path / "a", base=str(base), fan_in_fan_out=True)
    with pytest.raises(UserError, match="base is a 'gpt2', and GGUF files are written for llama"):
        export(str(tmp_path / "a"), rank=None, kind="gguf-lora", out=str(tmp_path / "l"))
    assert not (tmp_path / "l").exists()


def test_without_the_package_one_sentence_says_what_to_install(
    adapter_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    said = refusal(
        ["export", adapter_folder, "--format", "gguf-lora", "--out", tmp_path / "l"], capsys
    )
    assert "pip install 'flexlora[gguf]'" in said and not (tmp_path / "l").exists()


def test_bad_adapters_are_refused_in_one_sentence(adapter_folder, tmp_path, capsys):
    out = tmp_path / "out"
    above = refusal(["export", adapter_folder, "--rank", 9, "--out", out], capsys)
    assert "has rank 8; give at most 8" in above
    pickled = shutil.copytree(adapter_folder, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "a pickle, which is never opened" in refusal(["export", pickled, "--out", out], capsys)
    disguised = shutil.copytree(adapter_folder, tmp_path / "disguised")
    (disguised / "adapter_model.safetensors").write_bytes(b"\x80\x04K\x01.")
    said = refusal(["export", disguised, "--out", out], capsys)
    assert "cannot be read as safetensors" in said
    other = shutil.copytree(adapter_folder, tmp_path / "other")
    (other / "flexlora.json").write_text('{"format": 1, "base_fingerprint": "0123456789abcdef"}')
    for form in ("merged", "gguf"):
        said = refusal(["export", other, "--format", form, "--out", out], capsys)
        assert "has changed in weights or settings" in said
    assert not out.exists()


def test_a_run_folder_half_written_is_refused(tmp_path, capsys):
    from federation import small
    from flexlora.runs.folder import RunFolder

    RunFolder.create(tmp_path / "run", small())
    said = refusal(["export", tmp_path / "run", "--out", tmp_path / "out"], capsys)
    assert "Traceback" not in said and str(tmp_path / "run") in said


def test_options_that_do_not_fit_are_refused(adapter_folder, tmp_path):
    def refused(match, **options):
        with pytest.raises(UserError, match=match):
            export(str(adapter_folder), rank=None, out=str(tmp_path / "o"), **options)

    refused("--dtype is of --format gguf", kind="merged", dtype="f16")
    refused("--dtype is 'f15'.*Did you mean 'f1", kind="gguf", dtype="f15")
    refused("trained on a base of full precision", kind="merged", dequantize=True)


def test_every_folder_has_a_valid_card(adapter_folder, tmp_path):
    from huggingface_hub import ModelCard

    libraries = {"portable": "peft", "merged": "transformers", "gguf-lora": "gguf"}
    for form, library in libraries.items():
        export(str(adapter_folder), rank=None, kind=form, out=str(tmp_path / form))
        card = ModelCard.load(tmp_path / form / "README.md")
        assert card.data.library_name == library and card.data.license == "apache-2.0"
        assert "federated-learning" in card.data.tags and str(EMBEDDED) not in card.content
        assert ("| merged into | the base at full precision |" in card.content) == (
            form == "merged"
        )


def test_a_run_on_an_nf4_base_is_merged_into_its_rounded_base_only(tmp_path):
    from transformers import AutoModelForCausalLM

    from federation import small
    from flexlora.simulations.simulate import simulate

    simulate(small(model__quantization="nf4", num_server_rounds=1), tmp_path / "run")
    for source in (tmp_path / "run", tmp_path / "run" / "adapters" / "rank_2"):
        with pytest.raises(UserError, match=r"trained on a nf4 base.*--dequantize"):
            export(str(source), rank=2, kind="merged", out=str(tmp_path / "no"))
    out = tmp_path / "m"
    export(str(tmp_path / "run"), rank=2, kind="merged", out=str(out), dequantize=True)
    card = (out / "README.md").read_text()
    assert "the base rounded to nf4 and dequantized" in card and "| rank_2 |" in card
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    weight = "model.layers.1.mlp.up_proj.weight"  # not a target: NF4's 16 values a block
    got = merged.state_dict()[weight]
    full = load_base("embedded", device="cpu", fresh=True).model.state_dict()[weight]
    error = float((got - full).norm() / full.norm())
    assert 0.02 < error < 0.2 and len(got.reshape(-1, 64)[0].unique()) <= 16
