"""Checkpoints that do not fit their architecture: refused by tensor, nothing is drawn anew."""

import json

import pytest
import torch

import bases
from builders import tiny_model
from flexlora.errors import UserError
from flexlora.training.models import load_base

FIRST = "model.layers.0.mlp.up_proj.weight"


def refused(folder, message, **options):
    """The folder is refused with that sentence, which names it and is one line."""
    with pytest.raises(UserError, match=message) as refusal:
        load_base(str(folder), device="cpu", fresh=True, **options)
    sentence = str(refusal.value)
    assert str(folder) in sentence and "\n" not in sentence
    return sentence


def only(wanted):
    return lambda tensors: {name: x for name, x in tensors.items() if wanted(name)}


def renamed(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def added(**more):
    return lambda tensors: tensors.update({k.replace("__", "."): v for k, v in more.items()})


def cut(tensors):
    tensors[FIRST] = tensors[FIRST][:, :-1]


MISFITS = {
    "an interrupted copy": (
        only(lambda name: ".3.mlp" not in name),
        r"lacks 'model.layers.3.mlp.down_proj.weight', .*of a LlamaForCausalLM; copy .* random",
    ),
    "many missing": (only(lambda name: ".2." not in name), r"'[^']*' and 6 more of a Llama"),
    "a wrong prefix": (
        renamed(lambda name: f"module.{name}"),
        r"lacks 'lm_head.weight', .* 36 more .*holds 'module.model.embed.*35 more; rename them",
    ),
    "a wrapper's prefix": (
        renamed(lambda name: name.replace("layers", "blocks")),
        "lacks .* but holds 'model.blocks.0.input_layernorm.weight'",
    ),
    "an adapter not merged": (
        renamed(lambda name: name.replace("up_proj", "up_proj.base_layer")),
        r"lacks .*up_proj.*an adapter that was not merged: merge it",
    ),
    "weights of a quantizer": (
        renamed(lambda name: name.replace("down_proj.weight", "down_proj.qweight")),
        "lacks .*of a quantized checkpoint: give the float weights",
    ),
    "one layer more": (
        added(model__layers__4__mlp__up_proj__weight=torch.zeros(2, 2)),
        r"holds 'model.layers.4.mlp.up_proj.weight', for which .* not of one model",
    ),
    "a bias": (
        added(model__layers__1__self_attn__q_proj__bias=torch.zeros(128)),
        "holds 'model.layers.1.self_attn.q_proj.bias', for which a LlamaForCausalLM",
    ),
    "another shape": (cut, rf"'{FIRST}' is \[384, 127\] .* asks for \[384, 128\]; the two are not"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_by_tensor(kind, tmp_path):
    change, message = MISFITS[kind]
    refused(bases.with_tensors(bases.copied(tmp_path / "m"), change), message)


@pytest.mark.parametrize("quantization", ["nf4", "8bit"])
def test_a_quantized_load_refuses_the_same(quantization, tmp_path):
    for k, kind in enumerate(("an interrupted copy", "another shape", "one layer more")):
        change, message = MISFITS[kind]
        folder = bases.with_tensors(bases.copied(tmp_path / str(k)), change)
        refused(folder, message, quantization=quantization)


@pytest.mark.parametrize("kind", ["neox", "qwen2"])
def test_other_families_refuse_the_same(kind, tmp_path):
    name = {"neox": "gpt_neox.layers.1.attention.dense", "qwen2": "model.layers.1.mlp.up_proj"}
    folder = bases.tiny(tmp_path, kind)
    bases.with_tensors(folder, only(lambda tensor: name[kind] not in tensor))
    refused(folder, rf"lacks '{name[kind]}.(bias|weight)'")


def test_an_output_layer_that_is_not_there_is_refused_unless_it_is_tied(tmp_path):
    folder = bases.tiny(tmp_path)
    bases.with_tensors(folder, only(lambda name: name != "lm_head.weight"))
    refused(folder, r"lacks 'lm_head.weight' .*tie_word_embeddings is false .*output layer")
    bases.configured(folder, tie_word_embeddings=True)
    assert load_base(str(folder), device="cpu", fresh=True).vocab_size == 64


def test_what_is_stored_under_the_inner_models_names_is_whole(tmp_path):
    """GPT-2 on the hub has no ``transformer.`` before its names."""
    folder = bases.tiny(tmp_path, "gpt2")
    before = load_base(str(folder), device="cpu", fresh=True)
    bases.with_tensors(folder, renamed(lambda name: name.removeprefix("transformer.")))
    after = load_base(str(folder), device="cpu", fresh=True)
    assert before.fingerprint == after.fingerprint
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(tensor, after.model.state_dict()[name]), name


def test_value_heads_and_buffers_are_left_out_and_the_heads_said(tmp_path, caplog):
    folder = bases.copied(tmp_path / "m")
    more = {"v_head__summary__weight": torch.ones(1, 128)}
    more["model__layers__0__self_attn__rotary_emb__inv_freq"] = torch.ones(16)
    bases.with_tensors(folder, added(**more))
    plain = load_base("embedded", device="cpu")
    assert load_base(str(folder), device="cpu").fingerprint == plain.fingerprint
    assert "'v_head.summary.weight' are of no use for text" in caplog.text
    assert "inv_freq" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("gpt_neo", ["transformer.h.0.attn.attention.bias", "transformer.h.0.attn.masked_bias"]),
        ("gptj", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        (
            "gpt_neox",
            ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"],
        ),
    ],
)
def test_masks_that_older_copies_store_do_not_count(kind, stored, tmp_path, caplog):
    """As the hub's GPT-Neo and GPT-J do."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "n_embd": 32, "n_layer": 2}
    sizes |= {"n_head": 2, "rotary_dim": 8, "attention_types": [[["global"], 2]], "vocab_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
    config = AutoConfig.for_model(kind, **sizes, **ends)
    folder = bases.saved(tmp_path, AutoModelForCausalLM.from_config(config))
    plain = load_base(str(folder), device="cpu", fresh=True).fingerprint
    masks = {name: torch.ones(1, 1, 8, 8, dtype=torch.bool) for name in stored}
    bases.with_tensors(folder, lambda tensors: tensors.update(masks))
    assert load_base(str(folder), device="cpu", fresh=True).fingerprint == plain
    assert "bias" not in caplog.text


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8")]
)
def test_codes_without_a_configuration_are_refused(dtype, kind, tmp_path):
    """Codes read as numbers are another model, whose loss may look plausible."""

    def coded(tensors):
        tensors[FIRST] = (tensors[FIRST] * 8).to(dtype)

    folder = bases.with_tensors(bases.copied(tmp_path / "m"), coded)
    refused(folder, rf"'{FIRST}' is stored as {kind}, the codes of a quantized checkpoint")


def test_half_precision_is_loaded_in_the_dtype_asked_for(tmp_path):
    folder = bases.with_tensors(
        bases.copied(tmp_path / "m"), lambda found: {k: v.half() for k, v in found.items()}
    )
    bases.configured(folder, dtype="float16", torch_dtype="float16")
    for dtype in ("float32", "bfloat16"):
        base = load_base(str(folder), dtype=dtype, device="cpu", fresh=True)
        assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)}


def test_a_tensor_without_values_is_refused(tmp_path, monkeypatch):
    """Where transformers leaves one on torch's meta device, as an offloading load does."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = tiny_model("llama")
    nothing = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (empty, nothing))
    refused(bases.copied(tmp_path / "m"), "'lm_head.weight', .* more got no values")


def shard(folder, number=2):
    return folder / f"model-0000{number}-of-00002.safetensors"


def lost_tensor(folder):
    index = folder / "model.safetensors.index.json"
    placed = json.loads(index.read_text())
    placed["weight_map"]["model.extra.weight"] = shard(folder).name
    index.write_text(json.dumps(placed))


FILES = {
    "a shard cut short": (
        lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:-100]),
        "'model-00002-of-00002.safetensors' is damaged or cut short .*copy it again",
    ),
    "a shard of nothing": (
        lambda folder: shard(folder).write_bytes(b""),
        "'model-00002-of-00002.safetensors' is damaged or cut short",
    ),
    "a pointer": (
        lambda folder: shard(folder, 1).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "'model-00001-of-00002.safetensors' is a pointer of Git LFS.*`git lfs pull`",
    ),
    "a shard that is absent": (
        lambda folder: shard(folder).unlink(),
        "lacks 'model-00002-of-00002.safetensors' of the 2 files that .*index.json names; finish",
    ),
    "an index of other files": (
        lost_tensor,
        "index.json names 'model.extra.weight', which the file .*00002.* does not hold; copy the",
    ),
    "an index that is not one": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "has no weight_map of tensors to files",
    ),
    "no index": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        "holds 'model-00001-of-00002.safetensors', .*but neither model.safetensors nor",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_damaged_or_absent_are_refused_by_name(kind, tmp_path):
    damage, message = FILES[kind]
    folder = bases.sharded(bases.copied(tmp_path / "m"))
    damage(folder)
    refused(folder, message)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", "as 'pytorch_model.bin', a pickle, .* never opened; .*safetensors"),
        ("model.gguf", "has its weights as a GGUF file; expected model.safetensors"),
        ("notes.txt", "holds no weights; expected model.safetensors"),
    ],
)
def test_weights_of_another_kind_are_refused(file, message, tmp_path):
    folder = bases.copied(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / file)
    refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "'lama' .*which the transformers .*Did you mean 'llama'"),
        ({"model_type": "vit"}, "is a 'vit', for which transformers has no causal language model"),
        (
            {"model_type": "paligemma", "text_config": {}},
            "is a 'paligemma', for which transformers has no causal",
        ),
        (
            {"num_attention_heads": 3},
            r"config.json of model .* is refused by transformers: .*hidden size",
        ),
    ],
)
def test_an_architecture_that_is_not_there_is_refused(changes, message, tmp_path):
    refused(bases.configured(bases.copied(tmp_path / "m"), **changes), message)
