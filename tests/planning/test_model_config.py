"""The shape of a model of images or sound and text: its language model's, its towers counted."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import families
from family_configs import tiny_family
from flexlora.commands.cli import main
from flexlora.errors import UserError
from flexlora.planning.memory import training_memory, weight_bytes
from flexlora.planning.model_config import read_shape
from flexlora.planning.shapes import TrainingPlan
from flexlora.simulations.benchmarks import memory_case
from flexlora.training.targets import choose_targets

WITH_TOWERS = ("gemma3", "got_ocr2", "moss_transcribe_diarize")


def written(folder, values):
    folder.joinpath("config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module", params=WITH_TOWERS)
def multimodal(request, tmp_path_factory):
    config = tiny_family(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    return written(folder, config.to_dict()), AutoModelForCausalLM.from_config(config)


def test_parameters_and_targets_are_those_that_training_finds(multimodal):
    folder, model = multimodal
    shape = read_shape(folder)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    chosen = choose_targets(model, "all-linear")
    found = sorted(sizes for name, sizes in chosen.shapes.items())
    linears = [(x.out_features, x.in_features) for x in shape.linears] * shape.num_layers
    assert found == sorted(linears) and chosen.left_out
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(model.config.get_text_config())
    of_text = sum(p.numel() for p in text.parameters())
    assert shape.num_parameters - shape.tower_numbers == of_text < shape.num_parameters


def test_towers_are_in_the_bytes_of_the_weights(multimodal):
    folder, model = multimodal
    shape = read_shape(folder)
    plan = TrainingPlan(rank=1, max_length=8, dtype="bfloat16")
    assert sum(weight_bytes(shape, plan)) == 2 * sum(p.numel() for p in model.parameters())
    assert read_shape("embedded").tower_numbers == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), [("gemma3", "gemma3_text"), ("got_ocr2", "qwen2")])
def test_the_peak_of_a_training_beside_a_tower_is_the_predicted_one(name, text, tmp_path):
    inner = families.config_of(text).to_dict()
    config = AutoConfig.for_model(**tiny_family(name).to_dict() | {"text_config": inner})
    options = {"max_length": families.LENGTH, "batch": families.ROWS, "unified_memory": True}
    plan = TrainingPlan(rank=4, **options)
    terms = training_memory(read_shape(written(tmp_path, config.to_dict())), plan)
    base = families.base_of(families.model_of(config))
    memory_case.train_once(base, plan, families.VOCAB)  # the second has nothing left to set up
    peak = families.peak_bytes(lambda: memory_case.train_once(base, plan, families.VOCAB))
    assert terms.total - terms.unquantized_weights == pytest.approx(peak, rel=0.02)


def test_what_a_text_config_leaves_out_has_the_familys_default(tmp_path):
    text = {"model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 2}
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {"model_type": "gemma3", "text_config": text, "vision_config": tower}
    shape = read_shape(written(tmp_path, values | {"torch_dtype": "bfloat16"}))
    assert (shape.vocab_size, shape.num_heads, shape.head_dim) == (262208, 8, 256)
    assert (shape.dtype, shape.model_type) == ("bfloat16", "gemma3")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "paligemma", "text_config": {}}, "'paligemma', for which .* no causal"),
        ({"model_type": "llava", "text_config": {}}, "'llava', for which .* no causal"),
        ({"model_type": "qwen3_5_moe", "text_config": {}}, "_moe_text' is a mixture of experts"),
        ({"model_type": "fuyu", "text_config": {}}, "'persimmon', expected one of"),
        (
            {"model_type": "gemma3", "text_config": {"hidden_size": "wide"}},
            r"config\.json of model '.*' is refused by transformers: .*hidden_size",
        ),
    ],
)
def test_others_are_refused_in_one_sentence(values, message, tmp_path):
    with pytest.raises(UserError, match=message) as refusal:
        read_shape(written(tmp_path, values))
    assert "\n" not in str(refusal.value)


def test_the_plan_says_what_is_left_out(multimodal, capsys):
    folder, _ = multimodal
    towers = read_shape(folder).tower_numbers
    assert main(["plan", "--model", folder, "--memory", "1GB"]) == 0
    assert f"{towers:,} parameters that text does not reach are left out" in capsys.readouterr().out
    assert main(["plan", "--model", folder, "--memory", "1GB", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["tower_parameters"] == towers
