"""PEFT is the oracle: what is written here loads there, what PEFT wrote loads here."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

import reference
from builders import random_adapter, tiny_model
from flexlora import LoRAFactors, UserError, load_adapter, save_adapter
from flexlora.lora.adapters import Adapter
from flexlora.training.slots import SlotModel, find_targets

IDS = torch.randint(3, 64, (3, 10), generator=torch.Generator().manual_seed(1))
RANKS, ALPHAS = [4, 2, 7, 4], [16.0, 16.0, 5.0, 0.5, 32.0]
PEFT_NAMES = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "neox": ["query_key_value", "dense", "dense_4h_to_h"],
    "qwen2": ["q_proj", "k_proj", "up_proj"],
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def our_logits(kind, adapter):
    model = tiny_model(kind, dtype=torch.float32)
    targets = "|".join(name.replace(".", r"\.") for name in adapter)
    slots = SlotModel(model, targets)
    slots.load([adapter])
    return logits(model)


@pytest.mark.parametrize("layout", ["portable", "compact"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_gives_the_same_logits_from_a_folder_of_ours(architecture, rslora, layout, tmp_path):
    model = tiny_model(architecture, dtype=torch.float32)
    base_logits = logits(model)
    adapter = random_adapter(
        find_targets(model, "all-linear"), RANKS, alpha=ALPHAS, rslora=rslora, dtype=torch.float32
    )
    conv1d = architecture == "gpt2"
    save_adapter(adapter, tmp_path, base="tiny", layout=layout, fan_in_fan_out=conv1d)
    peft_model = PeftModel.from_pretrained(model, str(tmp_path))
    theirs, ours = logits(peft_model), our_logits(architecture, adapter)
    assert float((base_logits - ours).abs().max()) > 0.1, "the adapter does nothing"
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["portable", "compact"])
def test_the_config_is_truthful(shapes, layout, tmp_path):
    adapter = random_adapter(shapes, [4, 4, 2], alpha=[16.0, 8.0, 16.0], dtype=torch.float32)
    save_adapter(adapter, tmp_path, base="owner/model", layout=layout)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    ranks = config["rank_pattern"]
    assert list(ranks.values()) == ([2] if layout == "compact" else [])
    assert layout == "portable" or get_pattern_key(ranks, "mlp.up") in ranks
    assert config["alpha_pattern"] == {}
    assert config["base_model_name_or_path"] == "owner/model"
    assert sorted(config["target_modules"]) == sorted(shapes)


@pytest.mark.parametrize("layout", ["portable", "compact"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_ours_comes_back_with_the_same_products(shapes, tmp_path, rslora, layout):
    adapter = random_adapter(shapes, RANKS, alpha=ALPHAS, rslora=rslora, dtype=torch.float32)
    save_adapter(adapter, tmp_path / "new" / "folder", base="x", layout=layout)
    back = load_adapter(tmp_path / "new" / "folder")
    assert reference.adapter_distance(back, adapter) < 1e-7
    assert {f.rank for f in back.values()} == ({7} if layout == "portable" else {2, 4, 7})
    save_adapter(back, tmp_path / "again", base="x", layout=layout)
    assert load_adapter(tmp_path / "again").digest() == back.digest(), "no further rounding"


def test_a_scaling_that_is_a_power_of_two_costs_no_rounding(shapes, tmp_path):
    adapter = random_adapter(shapes, 4, alpha=16.0, dtype=torch.float32)
    save_adapter(adapter, tmp_path, base="x")
    assert reference.adapter_distance(load_adapter(tmp_path), adapter) == 0.0


def test_names_that_end_alike_keep_their_own_ranks(tmp_path):
    """PEFT's patterns match the end of a name: 1.q must not lend its rank to 11.q or x.1.q."""
    shapes = {"1.q": (8, 8), "11.q": (8, 8), "x.1.q": (8, 8), "x.11.q": (8, 8)}
    adapter = random_adapter(shapes, [2, 3, 4, 5], alpha=[1.0, 2.0, 3.0, 4.0], dtype=torch.float32)
    save_adapter(adapter, tmp_path, base="x", layout="compact")
    back = load_adapter(tmp_path)
    assert [f.rank for f in back.values()] == [f.rank for f in adapter.values()]
    assert reference.adapter_distance(back, adapter) < 1e-7


def peft_model_of(kind, **options):
    model = tiny_model(kind, dtype=torch.float32)
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 10,
            "target_modules": PEFT_NAMES[kind],
            "task_type": "CAUSAL_LM",
            "init_lora_weights": False,
            "fan_in_fan_out": kind == "gpt2",
            **options,
        }
    )
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_that_peft_wrote_gives_peft_s_logits(architecture, rslora, tmp_path):
    first, last = PEFT_NAMES[architecture][0], PEFT_NAMES[architecture][-1]
    theirs = peft_model_of(
        architecture,
        use_rslora=rslora,
        rank_pattern={first: 2, rf"1\..*{last}": 6},
        alpha_pattern={last: 3},
    )
    theirs.save_pretrained(str(tmp_path))
    adapter = load_adapter(tmp_path)
    assert {factors.rank for factors in adapter.values()} == {2, 4, 6}
    torch.testing.assert_close(our_logits(architecture, adapter), logits(theirs), rtol=0, atol=1e-5)


def test_a_named_peft_adapter_loads_too(tmp_path):
    """PEFT keeps the adapter's name out of the keys and in the folder's name."""
    model = tiny_model("llama", dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config, adapter_name="tuned").save_pretrained(str(tmp_path))
    assert len(load_adapter(tmp_path / "tuned")) == 2


def test_half_precision_folders_are_read_as_float32(shapes, tmp_path):
    adapter = random_adapter(shapes, 4, dtype=torch.bfloat16)
    save_adapter(adapter, tmp_path, base="x")
    back = load_adapter(tmp_path)
    assert {f.lora_A.dtype for f in back.values()} == {torch.float32}
    assert reference.adapter_distance(back, adapter) < 2.0**-8


def test_plain_and_rslora_modules_may_be_mixed(shapes, tmp_path):
    plain, rs = random_adapter(shapes), random_adapter(shapes, rslora=True)
    mixed = Adapter({**plain, "attn.q": rs["attn.q"]}).to(torch.float32)
    save_adapter(mixed, tmp_path, base="x")
    assert reference.adapter_distance(load_adapter(tmp_path), mixed) < 1e-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True, expected False: only plain LoRA"),
        ({"bias": "all"}, "bias='all', expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"lora_bias": True}, "lora_bias=True, expected False"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(options, message, tmp_path):
    peft_model_of("llama", **options).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path)


def test_another_kind_of_adapter_is_refused(tmp_path):
    from peft import IA3Config

    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(tiny_model("llama", dtype=torch.float32), config).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="has peft_type='IA3', expected 'LORA'"):
        load_adapter(tmp_path)


@pytest.fixture
def folder(shapes, tmp_path):
    """A good folder to spoil."""
    save_adapter(random_adapter(shapes, 4, dtype=torch.float32), tmp_path, base="x")
    return tmp_path


def spoil_config(folder, **changes):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def spoil_weights(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_files_that_are_missing_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"has no adapter_config\.json; is it a PEFT folder"):
        load_adapter(tmp_path / "nowhere")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors\.$"):
        load_adapter(folder)


def test_a_pickle_is_never_opened(folder):
    """The file would run code when unpickled; it is not even read."""
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match="a pickle, which is never opened"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 5}, "lora_A has rank 4, adapter_config.json says 5"),
        ({"rank_pattern": {"q": 3}}, "module 'attn.q': lora_A has rank 4, .* says 3"),
        ({"lora_alpha": 0}, "lora_alpha=0, expected a positive number"),
        ({"lora_alpha": "gone"}, "lora_alpha"),
        ({"r": "gone"}, "'r'"),
    ],
    ids=lambda value: str(value),
)
def test_a_config_that_contradicts_the_weights_is_refused(folder, changes, message):
    spoil_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_adapter(folder)


@pytest.mark.parametrize("text", ["{not json", "[]", "\xff"])
def test_a_config_that_cannot_be_read_is_refused(folder, text):
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError):
        load_adapter(folder)


def test_weights_that_cannot_be_read_are_refused(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(folder)


def test_weights_that_do_not_pair_up_are_refused(folder):
    key = "base_model.model.attn.q.lora_B.weight"
    spoil_weights(folder, lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=r"module 'attn\.q': only lora_A is there"):
        load_adapter(folder)


def test_other_tensors_are_refused(folder):
    def change(tensors):
        tensors["base_model.model.embed.lora_embedding_A"] = torch.zeros(2, 2)

    spoil_weights(folder, change)
    with pytest.raises(UserError, match=r"holds .*lora_embedding_A', expected lora_A and lora_B"):
        load_adapter(folder)


def test_factors_are_told_apart_by_name_in_a_folder_too(tmp_path):
    """Trap T5: square factors, rank = in = out."""
    A = torch.arange(16.0).reshape(4, 4)
    factors = LoRAFactors(lora_A=A, lora_B=-A, alpha=4.0)
    save_adapter(Adapter({"q": factors}), tmp_path, base="x")
    back = load_adapter(tmp_path)["q"]
    assert torch.equal(back.lora_A, A) and torch.equal(back.lora_B, -A)
    assert reference.relative_error(back.delta_weight(), -(A @ A)) == 0.0
