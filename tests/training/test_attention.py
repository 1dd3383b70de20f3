"""``model.attn-implementation``: one model whatever the kernel; a kernel that is not there."""

import importlib.util
import shutil
from types import SimpleNamespace

import pytest
import torch

import families
import reference
from builders import random_adapter, random_examples, train_job
from federation import small
from flexlora.clients.worker import Worker
from flexlora.commands.cli import main
from flexlora.config.paths import EMBEDDED
from flexlora.data.collation import collate
from flexlora.errors import UserError
from flexlora.training import models
from flexlora.training.local import TrainSettings, answer_losses, train
from flexlora.training.models import load_base
from flexlora.training.slots import SlotModel


def loaded(attention, **options):
    return load_base("embedded", attention=attention, device="cpu", **options)


def test_the_kernel_that_is_asked_for_is_the_one_that_runs():
    assert loaded("auto").model.config._attn_implementation == "sdpa"
    assert loaded("eager").model.config._attn_implementation == "eager"
    assert Worker(small(engine__device="cpu", model__attn_implementation="eager")).base is loaded(
        "eager"
    )


def test_a_base_is_loaded_once_for_each_kernel():
    assert loaded("eager") is loaded("eager") is not loaded("sdpa")
    assert loaded("eager").fingerprint == loaded("sdpa").fingerprint
    assert loaded("eager", fresh=True) is not loaded("eager")


def test_eager_and_fused_attention_give_the_same_logits_and_losses():
    """Rows of unequal length without a mask: padding is where no real token looks."""
    batch = collate([random_examples(6, shortest=5, longest=40)], pad_token_id=0)
    real = (batch.input_ids != 0) | (batch.input_ids.cumsum(1) == 0)
    logits, losses = [], []
    for attention in ("eager", "sdpa"):
        base = loaded(attention, fresh=True)
        with torch.no_grad():
            logits.append(base.model(input_ids=batch.input_ids, use_cache=False).logits[real])
            slots = SlotModel(base.model)
            slots.load([random_adapter(slots.shapes, 4, dtype=torch.float32)])
            losses.append(answer_losses(slots, batch)[0])
    assert reference.relative_error(logits[0], logits[1]) < 1e-5
    assert reference.relative_error(losses[0], losses[1]) < 1e-5
    assert reference.relative_error(logits[0], logits[1].roll(1, 0)) > 0.1


def test_a_client_trains_the_same_factors_with_either():
    rows, adapters = [random_examples(4)], []
    chosen = TrainSettings(learning_rate=0.01, per_device_train_batch_size=4, max_steps=2)
    for attention in ("eager", "sdpa"):
        slots = SlotModel(loaded(attention, fresh=True).model)
        job = train_job(random_adapter(slots.shapes, 4, dtype=torch.float32))
        adapters.append(train(slots, [job], rows, chosen)[0].adapter)
    assert reference.adapter_distance(adapters[0], adapters[1]) < 1e-4
    assert reference.adapter_distance(adapters[0], job.start.trained) > 1e-3


@pytest.fixture
def capped(tmp_path):
    """A tiny Gemma 2, whose capped scores torch's fused attention cannot compute."""
    families.model_of(families.config_of("gemma2")).save_pretrained(tmp_path)
    for file in EMBEDDED.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    return str(tmp_path)


def test_a_model_without_fused_attention_is_eager_and_refuses_what_it_lacks(capped):
    auto = load_base(capped, device="cpu", fresh=True)
    assert auto.model.config._attn_implementation == "eager"
    message = "model.attn-implementation is 'sdpa', which model .* cannot run; use 'auto'"
    with pytest.raises(UserError, match=message):
        load_base(capped, attention="sdpa", device="cpu")


@pytest.mark.parametrize(
    ("device", "package", "dtype", "message"),
    [
        ("cpu", True, "bfloat16", "runs on CUDA, but training runs on the cpu; use 'sdpa'"),
        ("cuda", False, "bfloat16", "needs the flash-attn package, which is not installed"),
        ("cuda", True, "float32", "takes 16-bit numbers, but model.dtype is float32"),
    ],
)
def test_flash_attention_where_it_cannot_run_is_refused_before_anything_is_loaded(
    monkeypatch, device, package, dtype, message
):
    found = SimpleNamespace() if package else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(models, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(models, "_load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=f"'flash_attention_2', which {message}"):
        load_base("embedded", attention="flash_attention_2", dtype=dtype)


def test_flash_attention_where_it_can_run_is_handed_on(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(models, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(models, "_load", lambda *given: given)
    given = load_base("embedded", attention="flash_attention_2", dtype="bfloat16", fresh=True)
    assert "flash_attention_2" in given


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("flash_attention_2", "which runs on CUDA, but training runs on the cpu"),
        ("egaer", "expected one of auto, eager, sdpa, flash_attention_2. Did you mean 'eager'?"),
    ],
)
def test_a_run_with_a_kernel_that_is_not_there_is_one_sentence(wanted, message, tmp_path, capsys):
    chosen = ["--set", f"model.attn-implementation={wanted}", "--set", "engine.device=cpu"]
    assert main(["simulate", *chosen, "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("flexlora: model.attn-implementation is") and message in printed
    assert printed.count("\n") == 1 and not (tmp_path / "run").exists()
