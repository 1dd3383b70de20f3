"""Bases by hub name, from a cache without a connection: the same checks, the same fingerprint."""

import json
import shutil

import huggingface_hub.constants
import pytest

import bases
from flexlora.errors import UserError
from flexlora.training.models import load_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``hub(name, change)`` puts a copy of the embedded base into the cache under that name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def publish(name, change=lambda folder: None):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        change(bases.copied(repository / "snapshots" / COMMIT))
        return name

    return publish


def test_a_hub_model_is_the_base_that_its_folder_is(hub, tmp_path):
    base = load_base(hub("owner/base"), device="cpu", fresh=True)
    assert base.name == "owner/base"
    assert base.fingerprint == load_base("embedded", device="cpu").fingerprint
    sharded = load_base(hub("owner/shards", bases.sharded), device="cpu", fresh=True)
    assert sharded.fingerprint == base.fingerprint


def adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def interrupted(folder):
    bases.with_tensors(folder, lambda found: {k: v for k, v in found.items() if ".2.mlp" not in k})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adapter, r"'owner/base' holds an adapter \(adapter_config.json\)"),
        (interrupted, "'owner/base' lacks 'model.layers.2.mlp.down_proj.weight'"),
        (
            lambda folder: bases.configured(folder, model_type="x", auto_map={"A": "b.C"}),
            r"'owner/base' has the model_type 'x', .*code of its own \(b.py",
        ),
        (
            lambda folder: shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin"),
            "'owner/base' cannot be loaded: ",
        ),
    ],
)
def test_a_hub_model_is_refused_like_a_folder(change, message, hub):
    with pytest.raises(UserError, match=message) as refusal:
        load_base(hub("owner/base", change), device="cpu", fresh=True)
    assert "\n" not in str(refusal.value)
