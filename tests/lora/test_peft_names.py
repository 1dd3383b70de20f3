"""Our tables of PEFT's rules against PEFT and transformers, and what is saved against them."""

import json

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, check_target_module_exists
from peft.utils import transformers_weight_conversion as rules
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

from family_checks import adapter, build
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.peft_folder import save_adapter
from flexlora.lora.peft_names import FORBIDDEN, REWRITTEN, is_matched, peft_cause, unaddressable


def test_the_rewritten_families_are_those_of_peft_and_transformers():
    bases = rules._MOE_TARGET_MODULE_MAPPING
    rewritten = {
        kind: frozenset(bases[base])
        for kind, base in _MODEL_TO_CONVERSION_PATTERN.items()
        if base in bases and kind.islower()
    }
    assert rewritten == REWRITTEN


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_the_forbidden_names_are_those_that_peft_refuses(kind):
    model = torch.nn.Module()
    model.config = torch.nn.Module()
    model.config.model_type = kind
    for leaf in ("in_proj", "out_proj", "conv1d", "x_proj", "o_proj"):
        refused = False
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, leaf)
        except ValueError:
            refused = True
        assert refused == bool(peft_cause(kind, f"layers.0.mixer.{leaf}"))


@pytest.mark.parametrize(
    ("target", "name"),
    [("a.q", "a.q"), ("a.q", "x.a.q"), ("a.q", "xa.q"), ("q", "a.q"), ("q", "a.qq"), ("a.q", "q")],
)
def test_names_match_as_in_peft(target, name):
    theirs = check_target_module_exists(LoraConfig(target_modules=[target]), name)
    assert is_matched(target, name) == bool(theirs)


def test_a_name_that_is_the_end_of_another_is_found():
    names = ["proj", "tower.proj", "tower.q", "q_tower"]
    assert unaddressable(["proj"], names) == {"proj": "tower.proj"}
    assert unaddressable(["proj", "tower.proj"], names) == {}
    assert unaddressable(["tower.q"], names) == {}


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next", "laguna", "minimax"])
def test_the_list_that_is_saved_selects_the_same_modules_after_pefts_rewriting(name, tmp_path):
    from flexlora.training.targets import find_targets

    model = build(name)
    saved = adapter(find_targets(model, "all-linear"), 2, 1)
    save_adapter(saved, tmp_path, base="x")
    config = LoraConfig.from_pretrained(tmp_path)
    rules._convert_peft_config_moe(config, model)
    names = [n for n, _ in model.named_modules() if check_target_module_exists(config, n)]
    assert set(names) == set(saved) and not config.target_parameters


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("deepseek_v3", "model.layers.0.mlp.gate_proj"),
        ("mamba2", "backbone.layers.0.mixer.out_proj"),
        ("minimax", "model.layers.0.mlp.gate"),
        ("laguna", "model.layers.1.mlp.shared_experts.up_proj"),
    ],
)
def test_names_that_peft_would_lose_are_not_written(kind, name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    factors = LoRAFactors(lora_A=torch.ones(1, 4), lora_B=torch.ones(4, 1), alpha=1.0)
    with pytest.raises(UserError, match=rf"'{name}' of .* would be lost in PEFT"):
        save_adapter(Adapter({name: factors}), tmp_path / "out", base=str(tmp_path))
    save_adapter(
        Adapter({"model.layers.0.self_attn.q_proj": factors}), tmp_path / "out", base=str(tmp_path)
    )
