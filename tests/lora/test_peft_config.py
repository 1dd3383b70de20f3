"""Every field of PEFT's configuration is read, harmless or refused; PEFT itself is the oracle."""

import dataclasses
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from builders import random_adapter, tiny_model
from flexlora import UserError, load_adapter, save_adapter
from flexlora.lora.peft_config import CHANGED, HARMLESS, READ, read_config
from flexlora.training.slots import SlotModel

IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))
NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.layers.1.mlp.gate",
    "q_proj",
    "lm_head",
]


@pytest.fixture
def folder(shapes, tmp_path):
    """A sound folder of ours, to change."""
    save_adapter(random_adapter(shapes, 4, dtype=torch.float32), tmp_path, base="x")
    return tmp_path


def change(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def test_every_field_of_the_installed_peft_is_in_one_table():
    """A field that a newer PEFT adds has to be put into one, by what it does to the model."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    tables = [READ, HARMLESS, set(CHANGED)]
    assert fields <= set().union(*tables)
    assert sum(map(len, tables)) == len(set().union(*tables))
    defaults = {f.name: f.default for f in dataclasses.fields(LoraConfig)}
    assert {key: default for key, (default, _) in CHANGED.items()} == {
        key: defaults[key] for key in CHANGED
    }


WAYS_TO_BE_MORE_THAN_LORA = {
    "use_dora": True,
    "bias": "lora_only",
    "modules_to_save": ["score"],
    "lora_bias": True,
    "trainable_token_indices": {"embed_tokens": [3]},
    "layer_replication": [[0, 2], [1, 3]],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "megatron_config": {"hidden_size": 8},
    "alora_invocation_tokens": [80, 90],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"scale": 1.0},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
}


@pytest.mark.parametrize("key", CHANGED)
def test_what_makes_another_model_than_lora_is_refused_with_its_value(folder, key):
    value = WAYS_TO_BE_MORE_THAN_LORA[key]
    with pytest.raises(UserError, match=rf"has {key}=.*expected .*: only plain LoRA") as refusal:
        load_adapter(change(folder, **{key: value}))
    assert repr(value) in str(refusal.value)
    for empty in (CHANGED[key][0], None, [], {}, False, ""):
        assert load_adapter(change(folder, **{key: empty}))


@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_how_it_was_trained_does_not_matter(folder, key):
    expected = load_adapter(folder).digest()
    for value in ({"a": 1}, 0.1, True, "FEATURE_EXTRACTION", None):
        assert load_adapter(change(folder, **{key: value})).digest() == expected


@pytest.mark.parametrize("value", [True, 1, "on", {"a": 1}, [0]])
def test_a_field_of_a_newer_peft_is_refused_where_it_is_set(folder, value):
    with pytest.raises(UserError, match=r"has use_doraa=.*Did you mean 'use_dora'.*Remove the fie"):
        load_adapter(change(folder, use_doraa=value))
    for empty in (None, False, 0, "", [], {}):
        assert load_adapter(change(folder, use_doraa=empty))


CONVERT = r"save it again with PEFT's save_pretrained\(\.\.\., path_initial_model_for_weight_conv"


@pytest.mark.parametrize(
    ("start", "remedy"),
    [
        ("pissa", CONVERT),
        ("pissa_niter_16", CONVERT),
        ("olora", CONVERT),
        ("corda", CONVERT),
        ("lora_ga", CONVERT),
        ("loftq", "merge it into the base that LoftQ made"),
        ("of_a_newer_peft", CONVERT),
        (3, CONVERT),
    ],
)
def test_factors_whose_start_changed_the_base_are_refused_with_the_remedy(folder, start, remedy):
    with pytest.raises(UserError, match=rf"has init_lora_weights={start!r}: .*{remedy}"):
        load_adapter(change(folder, init_lora_weights=start))


@pytest.mark.parametrize(
    "start", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"]
)
def test_starts_that_leave_the_base_are_read(folder, start):
    assert load_adapter(change(folder, init_lora_weights=start, eva_config={"rho": 2.0}))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def trained(config, folder, **save):
    """A PEFT folder after three steps, and the logits of the model that was trained."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama", dtype=torch.float32), config)
    if "path_initial_model_for_weight_conversion" in save:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(save["path_initial_model_for_weight_conversion"])
        model.peft_config["default"].init_lora_weights = config.init_lora_weights
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder, **save)
    return logits(model)


def ours(folder):
    model, adapter = tiny_model("llama", dtype=torch.float32), load_adapter(folder)
    SlotModel(model, ",".join(adapter)).load([adapter])
    return logits(model)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_remedy_works(tmp_path, start):
    """PEFT's conversion gives plain LoRA over the base, at twice the rank."""
    config = LoraConfig(
        r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"], init_lora_weights=start
    )
    trained(config, tmp_path / "raw")
    with pytest.raises(UserError, match=f"has init_lora_weights='{start}'"):
        load_adapter(tmp_path / "raw")
    initial = str(tmp_path / "initial")
    truth = trained(config, tmp_path / "plain", path_initial_model_for_weight_conversion=initial)
    torch.testing.assert_close(ours(tmp_path / "plain"), truth, rtol=0, atol=1e-4)


CONFIGS = {
    "a regular expression": {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
    "without some": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["1.mlp.up_proj"]},
    "all but": {"target_modules": "all-linear", "exclude_modules": r".*(gate|down)_proj"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "a layer of a list": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": ["h", "layers"],
    },
    "rslora by pattern": {
        "target_modules": ["k_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"^model.layers.0.self_attn.k_proj": 2, r"layers\.1\..*": 3},
        "alpha_pattern": {"k_proj": 2, "layers.1.mlp.down_proj": 5},
    },
    "a start of its own": {"target_modules": ["o_proj"], "init_lora_weights": "orthogonal"},
    "minor components": {"target_modules": ["o_proj"], "init_lora_weights": "mica"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_that_peft_trained_gives_peft_s_logits(name, tmp_path):
    """The trained model's, not those of a second reading."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = trained(LoraConfig(r=4, lora_alpha=6, **CONFIGS[name]), tmp_path)
        base = logits(tiny_model("llama", dtype=torch.float32))
        again = PeftModel.from_pretrained(tiny_model("llama", dtype=torch.float32), tmp_path).eval()
    assert float((truth - base).abs().max()) > 1e-3
    torch.testing.assert_close(logits(again), truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(tmp_path), truth, rtol=0, atol=1e-5)


TARGETS = [
    {"target_modules": ["q_proj", "gate"]},
    {"target_modules": ["layers.1.self_attn.q_proj", "lm_head"]},
    {"target_modules": r".*\.(q_proj|gate)"},
    {"target_modules": "q_proj"},
    {"target_modules": []},
    {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r"model\.layers\.1\..*"},
    {"target_modules": ["q_proj", "up_proj", "gate"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 11]},
    {"target_modules": ["up_proj"], "layers_to_transform": 0, "layers_pattern": "experts"},
    {"target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": ["layers"]},
]


@pytest.mark.parametrize("fields", TARGETS, ids=str)
def test_modules_are_targeted_as_peft_targets_them(folder, fields):
    config = read_config(change(folder, **fields) / "adapter_config.json")
    empty = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    theirs = SimpleNamespace(**{**empty, **fields}, modules_to_save=None, target_parameters=None)
    for name in NAMES:
        assert config.targets(name) == bool(check_target_module_exists(theirs, name)), name


PATTERNS = [
    {"q_proj": 2},
    {"1.self_attn.q_proj": 2, "q_proj": 3},
    {"q_proj": 3, "1.self_attn.q_proj": 2},
    {r"^model\.layers\.1\..*": 5, ".*": 7},
    {"layers.1.mlp.(gate|up_proj)": 2, "gate|lm_head": 9},
    {"proj": 4},
    {},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_first_pattern_that_matches_as_peft_matches_gives_rank_and_alpha(folder, pattern):
    changed = change(folder, rank_pattern=pattern, alpha_pattern=pattern)
    config = read_config(changed / "adapter_config.json")
    for name in NAMES:
        key = get_pattern_key(pattern.keys(), name)
        assert config.rank_of(name) == pattern.get(key, 4), name
        assert config.alpha_of(name) == pattern.get(key, 4), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": True}, "has r=True, expected a whole number above 0"),
        ({"r": "4"}, "has r='4', expected a whole number above 0"),
        ({"r": 4.0}, "has r=4.0, expected a whole number above 0"),
        ({"lora_alpha": True}, "has lora_alpha=True, expected a positive number"),
        ({"lora_alpha": 10**400}, "has lora_alpha=1000.*, expected a positive number"),
        ({"lora_alpha": float("nan")}, "has lora_alpha=nan, expected a positive number"),
        ({"rank_pattern": {"q": 0}}, r"has rank_pattern\['q'\]=0, expected a whole number above 0"),
        ({"rank_pattern": ["q"]}, r"has rank_pattern=\['q'\], expected an object of values by mod"),
        ({"alpha_pattern": {"(": 4}}, r"has alpha_pattern=.*, expected a regular expression"),
        ({"alpha_pattern": {"q": -1}}, r"has alpha_pattern\['q'\]=-1, expected a positive number"),
        ({"target_modules": 3}, "has target_modules=3, expected a text or a list of names"),
        ({"target_modules": ["q", 1]}, r"has target_modules=\['q', 1\], expected a text or a list"),
        ({"target_modules": "[a"}, r"has target_modules='\[a', expected a regular expression"),
        ({"exclude_modules": {}}, "has exclude_modules={}, expected a text or a list of names"),
        ({"layers_to_transform": "1"}, "has layers_to_transform='1', expected whole numbers"),
        ({"layers_pattern": "(?P<idx>a)"}, "has layers_pattern=.*, expected a regular expression"),
        ({"use_rslora": "false"}, "has use_rslora='false', expected true or false"),
        ({"base_model_name_or_path": 7}, "has base_model_name_or_path=7, expected a text"),
        ({"peft_type": None}, "has peft_type=None, expected 'LORA'"),
        ({"target_modules": ["attn.q"]}, r"holds module 'attn.v', which adapter_config.json does"),
        (
            {"target_modules": ["attn.q", "attn.v", "mlp.up", "layers.3.q"]},
            r"no factors of module 'layers.3.q', which .* Is the file whole",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_value_that_peft_would_not_take_is_refused_by_its_field(folder, fields, message):
    with pytest.raises(UserError, match=message):
        load_adapter(change(folder, **fields))


def test_a_list_that_serves_many_models_may_name_modules_that_this_one_lacks(folder):
    names = ["attn.q", "attn.v", "mlp.up", "query_key_value", "self_attn.qkv_proj"]
    assert load_adapter(change(folder, target_modules=names))
