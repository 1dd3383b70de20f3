"""The modules that a server expects of a base: those that a node finds in the model itself."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
from flexlora.planning.architectures import FAMILIES
from flexlora.planning.base_modules import base_modules
from flexlora.training.targets import find_targets


def written(folder, config):
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("targets", ["all-linear", "leaves", "expression"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_of_every_family_they_are_those_of_the_model(family, targets, tmp_path):
    config = families.config_of(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    whole = find_targets(model, "all-linear")
    leaf = next(iter(whole)).rpartition(".")[2]
    chosen = {"all-linear": "all-linear", "leaves": leaf, "expression": f".*{leaf}"}[targets]
    shapes, transposed = find_targets(model, chosen), family == "gpt2"
    known = base_modules(written(tmp_path, config), chosen)
    assert known.difference(shapes, fan_in_fan_out=transposed) == ""
    assert known.difference(shapes, fan_in_fan_out=not transposed).startswith("fan_in_fan_out")
    assert (known.chosen is None) == (targets == "expression")
    first = next(iter(shapes))
    larger = {**shapes, first: (shapes[first][0] + 1, shapes[first][1])}
    assert known.difference(larger, fan_in_fan_out=transposed).startswith(f"module '{first}' is")
    del shapes[first]
    lacks = known.difference(shapes, fan_in_fan_out=transposed)
    assert (lacks == "") == (targets == "expression")


def test_without_a_config_json_here_or_a_known_family_nothing_is_expected(tmp_path):
    assert base_modules("meta-llama/Llama-2-7b-hf", "all-linear") is None
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}', encoding="utf-8")
    assert base_modules(str(tmp_path), "all-linear") is None
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert base_modules(str(tmp_path), "all-linear") is None
    assert base_modules("embedded", "all-linear").num_layers == 4
