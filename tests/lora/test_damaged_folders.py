"""3,000 damaged PEFT folders: each is read as its files say, or refused in one sentence."""

import json
import math
import os
import random
import shutil
import time
import warnings

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load, save

from builders import random_adapter
from damage import damaged_bytes, damaged_json, damaged_value
from flexlora import UserError, load_adapter, save_adapter

SHAPES = {
    "model.layers.0.q_proj": (5, 4),
    "model.layers.1.q_proj": (5, 4),
    "model.layers.1.up_proj": (6, 3),
}
COUNT = 3000
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIELDS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "peft_type",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "revision",
    "base_model_name_or_path", "use_dora", "bias", "fan_in_fan_out", "alora_invocation_tokens",
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of two sound folders: one of ours, one with the fields of PEFT's own."""
    folder = tmp_path_factory.mktemp("good")
    adapter = random_adapter(SHAPES, [2, 2, 1], alpha=[4.0, 4.0, 3.0], dtype=torch.float32)
    save_adapter(adapter, folder, base="x", layout="compact")
    config, weights = ((folder / name).read_bytes() for name in (CONFIG, WEIGHTS))
    theirs = json.loads(config) | {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {r"layers\.1\.up_proj": 1},
        "alpha_pattern": {"up_proj": 3},
        "exclude_modules": ["o_proj"],
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
    }
    return [(config, weights), (json.dumps(theirs).encode(), weights)]


def damaged_field(config, draw):
    tree = json.loads(config)
    for _ in range(draw.choice([1, 1, 2])):
        key = draw.choice(FIELDS)
        tree[key] = damaged_value(tree.get(key), draw)
        if draw.random() < 0.1:
            tree[key] = {"q_proj": damaged_value(1, draw), draw.choice(["(", "a*", ""]): 2}
    return json.dumps(tree).encode()


def damaged_tensors(weights, draw):
    """Renamed, doubled, reshaped, in another dtype, not finite, removed or added."""
    tensors = load(weights)
    for _ in range(draw.choice([1, 1, 2])):
        key = draw.choice(sorted(tensors))
        tensor, what = tensors.pop(key), draw.randrange(7)
        if what == 0:
            tail = draw.choice(["x", ".weight", ".bias", "", "\n", ".é"])
            tensors[key.replace("weight", "") + tail] = tensor
        elif what == 1:
            twin = draw.choice(["lora_A.two.", "lora_B.default.", "lora_A.", "lora_embedding_A."])
            tensors |= {key: tensor, key.replace("lora_A.", twin).replace("q_pro", "r_pro"): tensor}
            tensors[key.replace("lora_B.", "lora_B.other.")] = tensor.clone()
        elif what == 2:
            shape = draw.choice([(-1,), (1, *tensor.shape), tensor.T.shape, (1, -1), (-1, 1)])
            tensors[key] = tensor.reshape(shape).clone()
        elif what == 3:
            names = "int64 bool float16 bfloat16 float64 uint8 complex64 float8_e4m3fn float8_e5m2"
            tensors[key] = tensor.to(getattr(torch, draw.choice(names.split())))
        elif what == 4 and tensor.numel():
            bad = draw.choice([math.nan, math.inf, -math.inf, 1e39])
            changed = tensor.double().clone()
            changed.view(-1)[draw.randrange(changed.numel())] = bad
            tensors[key] = changed if bad == 1e39 else changed.float()
        elif what == 5:
            tensors[key] = tensor.new_zeros(draw.choice([(0,), (0, 4), (5, 0), (), (2, 4)]))
        if not tensors:
            return save({})
    return save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})


def damaged_header(weights, draw):
    """Another JSON header over the same numbers, its length made to fit."""
    length = int.from_bytes(weights[:8], "little")
    header = damaged_json(json.loads(weights[8 : 8 + length]), draw, 2)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + weights[8 + length :]


def damage(folder, good, draw):
    """Write one damaged folder."""
    config, weights = draw.choice(good)
    what = draw.randrange(10)
    if what < 3:
        config = damaged_field(config, draw)
    elif what == 3:
        config = json.dumps(damaged_json(json.loads(config), draw, 2)).encode()
    elif what == 4:
        config = damaged_bytes(config, draw)
    elif what < 7:
        weights = damaged_tensors(weights, draw)
    elif what == 7:
        weights = damaged_header(weights, draw)
    elif what == 8:
        weights = damaged_bytes(weights, draw)
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    if what == 9:
        misplaced(folder / draw.choice([CONFIG, WEIGHTS]), draw)


def misplaced(file, draw):
    """A directory, a link to nothing, to itself, to the folder or to a copy; nothing at all."""
    data = file.read_bytes()
    file.unlink()
    what = draw.randrange(6)
    if what == 0:
        file.mkdir()
    elif what < 4:
        file.symlink_to([file.parent / "nowhere", file, file.parent][what - 1])
    elif what == 4:
        copy = file.with_suffix(".copy")
        copy.write_bytes(data)
        file.symlink_to(copy)


def is_what_the_files_say(adapter, folder):
    """Every tensor of the file is in the adapter, at the rank, alpha and scaling PEFT would take.

    The oracle reads the files again: safetensors' tensors, PEFT's ``get_pattern_key``.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
    tensors = load((folder / WEIGHTS).read_bytes())
    assert len(tensors) == 2 * len(adapter)
    for name, factors in adapter.items():
        for label in ("lora_A", "lora_B"):
            heads = (f"base_model.model.{name}.{label}", f"{name}.{label}")
            (stored,) = [t for key, t in tensors.items() if key.startswith(heads)]
            assert torch.equal(getattr(factors, label), stored.float())
            assert bool(torch.isfinite(getattr(factors, label)).all())
        ranks, alphas = (config.get(f"{kind}_pattern") or {} for kind in ("rank", "alpha"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rank = ranks.get(get_pattern_key(ranks, name), config["r"])
            alpha = alphas.get(get_pattern_key(alphas, name), config["lora_alpha"])
        assert type(rank) is int and factors.rank == rank
        assert factors.alpha == alpha
        assert factors.rslora == bool(config.get("use_rslora"))
    assert config["peft_type"] == "LORA"
    for key in ("use_dora", "alora_invocation_tokens", "new_field"):
        assert not config.get(key)
    assert config.get("bias") in ("none", None) or not config["bias"]


def test_a_damaged_folder_is_read_as_its_files_say_or_refused(good, tmp_path):
    """Of 3,000, 107 once ended in TypeError, AttributeError or re.error."""
    draw, refused, read = random.Random(14), 0, 0
    began = time.process_time()
    for index in range(COUNT):
        folder = tmp_path / str(index)
        folder.mkdir()
        damage(folder, good, draw)
        try:
            adapter = load_adapter(folder)
        except UserError as error:
            assert "\n" not in str(error) and str(folder) in str(error), f"{index}: {error}"
            assert len(str(error)) < 600
            refused += 1
        except Exception as error:
            raise AssertionError(f"folder {index}: {type(error).__name__}: {error}") from error
        else:
            is_what_the_files_say(adapter, folder)
            read += 1
        shutil.rmtree(folder)
    assert refused > COUNT // 2 and read > COUNT // 20
    assert time.process_time() - began < 20.0


def test_the_sound_folders_are_read(good, tmp_path):
    for k, (config, weights) in enumerate(good):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + config)
        (folder / WEIGHTS).write_bytes(weights)
        adapter = load_adapter(folder)
        assert [f.rank for f in adapter.values()] == [2, 2, 1]
        is_what_the_files_say(adapter, folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\ufeff\ufeff{}"])
def test_json_that_breaks_the_parser_is_refused(good, tmp_path, text):
    (tmp_path / CONFIG).write_text(text, encoding="utf-8")
    (tmp_path / WEIGHTS).write_bytes(good[0][1])
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b", ""])
def test_a_path_that_no_file_can_have_is_refused(path):
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        load_adapter(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(good, tmp_path):
    (tmp_path / CONFIG).write_bytes(good[0][0])
    (tmp_path / WEIGHTS).write_bytes(good[0][1])
    (tmp_path / CONFIG).chmod(0)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_adapter(tmp_path)
