"""What five runtimes make of a folder, by small readers of the raw files, in both layouts.

Each reader multiplies ``lora_B @ lora_A`` as its runtime's source does (November 2026).
"""

import json
import math

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

import reference
from builders import random_adapter
from flexlora import save_adapter
from flexlora.lora.peft_config import read_config
from flexlora.lora.runtimes import RUNTIMES, misreading


def patterned(config, kind, default, name):
    pattern = config[f"{kind}_pattern"]
    return pattern.get(get_pattern_key(pattern, name), config[default])


def peft(config, name, rank):
    rank = patterned(config, "rank", "r", name)
    alpha = patterned(config, "alpha", "lora_alpha", name)
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def old_vllm(config, name, rank):
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])


def sglang(config, name, rank):
    assert not config["rank_pattern"], "refused"
    return config["lora_alpha"] / config["r"]


def llama_cpp(config, name, rank):
    return config["lora_alpha"] / rank


READERS = {
    "PEFT 0.21": peft,
    "vLLM 0.32 and later": peft,
    "vLLM up to 0.31": old_vllm,
    "SGLang 0.5": sglang,
    "llama.cpp": llama_cpp,
}
READ_RIGHT = {
    "portable": set(READERS),
    "compact": {"PEFT 0.21", "vLLM 0.32 and later", "llama.cpp"},
}


def products(folder, reader):
    """The change of each module as a runtime computes it, float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, lora_A in tensors.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lora_B = tensors[key.replace("lora_A", "lora_B")]
            scaling = reader(config, name, lora_A.shape[0])
            found[name] = scaling * lora_B.double() @ lora_A.double()
    return found


def right(folder, reader, adapter):
    try:
        found = products(folder, reader)
    except AssertionError:
        return False
    truth = {name: f.map(torch.Tensor.double).delta_weight() for name, f in adapter.items()}
    return all(reference.relative_error(found[name], truth[name]) < 1e-6 for name in adapter)


def verdicts(folder, adapter):
    config = read_config(folder / "adapter_config.json")
    return {runtime.name: misreading(runtime, config, adapter) for runtime in RUNTIMES}


def mixed(shapes, rslora=False):
    return random_adapter(
        shapes, [4, 2, 3], alpha=[16.0, 16.0, 5.0], rslora=rslora, dtype=torch.float32
    )


@pytest.mark.parametrize("layout", READ_RIGHT)
@pytest.mark.parametrize("rslora", [False, True])
def test_each_runtime_reads_a_layout_as_the_table_says(shapes, layout, rslora, tmp_path):
    adapter = mixed(shapes, rslora)
    save_adapter(adapter, tmp_path, base="x", layout=layout)
    read = {name for name, reader in READERS.items() if right(tmp_path, reader, adapter)}
    assert read == READ_RIGHT[layout]
    assert {name for name, cause in verdicts(tmp_path, adapter).items() if not cause} == read


def test_equal_ranks_are_read_right_by_all_in_either_layout(shapes, tmp_path):
    adapter = random_adapter(shapes, 4, alpha=[16.0, 5.0, 16.0], rslora=True, dtype=torch.float32)
    for layout in READ_RIGHT:
        save_adapter(adapter, tmp_path / layout, base="x", layout=layout)
        assert set(verdicts(tmp_path / layout, adapter).values()) == {""}
        assert all(right(tmp_path / layout, reader, adapter) for reader in READERS.values())


@pytest.mark.parametrize(
    ("changes", "causes"),
    [
        (
            {"rank_pattern": {"q": 4}, "r": 2},
            {"vLLM up to 0.31": "module 'attn.q' at 2 times", "SGLang 0.5": "ranks that differ"},
        ),
        (
            {"rank_pattern": {"v": 2, "up": 3}, "alpha_pattern": {"up": 12}},
            {
                "vLLM up to 0.31": "module 'attn.v' at 0.5 times",
                "SGLang 0.5": "here 2 to 4",
                "llama.cpp": "module 'mlp.up' at 0.333 times",
            },
        ),
        ({"use_rslora": True}, {"SGLang 0.5": "0.5 times", "llama.cpp": "0.5 times"}),
        ({"r": 600}, {"vLLM 0.32 and later": "takes ranks up to 512, here 600"}),
    ],
    ids=["rank_pattern", "alpha_pattern", "rslora", "rank"],
)
def test_a_folder_from_elsewhere_is_judged_runtime_by_runtime(shapes, changes, causes, tmp_path):
    save_adapter(random_adapter(shapes, 4, dtype=torch.float32), tmp_path, base="x")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    found = {name: cause for name, cause in verdicts(tmp_path, shapes).items() if cause}
    assert set(found) == set(causes)
    for name, words in causes.items():
        assert words in found[name]
