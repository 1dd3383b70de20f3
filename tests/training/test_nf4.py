"""QLoRA for real, without a GPU: bitsandbytes' NF4 linears under our slots (arXiv 2305.14314)."""

import pytest
import torch

import reference
from builders import random_adapter, random_examples, tiny_model, train_job
from flexlora.aggregation.engine.starts import LocalPlan
from flexlora.data.collation import collate
from flexlora.training import models
from flexlora.training.local import TrainSettings, answer_losses, train
from flexlora.training.slots import SlotModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama on disk, with a tokenizer beside it, as a person's own model would be."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    target = tmp_path_factory.mktemp("model")
    tiny_model("llama", dtype=torch.float32, hidden=64).save_pretrained(target)
    core = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="w1", eos_token="w2", pad_token="w0"
    ).save_pretrained(target)
    return str(target)


@pytest.fixture
def model(folder, monkeypatch):
    """The NF4 base as ``flexlora simulate --set model.quantization=nf4`` loads it, fresh."""
    monkeypatch.setattr(models, "_loaded", {})
    return models.load_base(folder, quantization="nf4", device="cpu").model


def nf4_linears(model):
    return {n: m for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}


def base_bytes(model):
    """What the weights are held as, read without ``state_dict``, which may unpack them."""
    held = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    for name, module in nf4_linears(model).items():
        held[f"{name}.absmax"] = module.weight.quant_state.absmax.clone()
    return held


def test_an_nf4_base_is_really_four_bits(model):
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == 128 * 64 // 2


def test_training_through_nf4_lowers_the_loss_and_leaves_the_base_bytes(model):
    before = base_bytes(model)
    slots = SlotModel(model)
    assert slots.shapes["model.layers.1.mlp.down_proj"] == (64, 128)
    jobs = [
        train_job(random_adapter(slots.shapes, rank, seed=rank, dtype=torch.float32), f"c{rank}")
        for rank in (2, 5)
    ]
    rows = [random_examples(4, seed=k) for k in range(2)]
    chosen = TrainSettings(learning_rate=0.01, per_device_train_batch_size=4, max_steps=1)
    results = train(slots, jobs, rows, chosen)
    for result, job in zip(results, jobs, strict=True):
        assert result.loss_after < result.loss_before
        assert reference.adapter_distance(result.adapter, job.start.trained) > 1e-3
    slots.remove()
    after = base_bytes(model)
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("targets", ["all-linear", "q_proj"])
def test_gradients_through_nf4_are_those_of_the_dequantized_base(model, targets):
    """The frozen weight enters the gradient of what lies below it: it must be the same weight."""
    import bitsandbytes.functional as bnb

    dense = tiny_model("llama", dtype=torch.float32, hidden=64)
    for name, module in nf4_linears(model).items():
        weight = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        dense.get_submodule(name).weight.data.copy_(weight)
    rows = [random_examples(3, seed=k) for k in range(2)]
    gradients = []
    for base in (model, dense):
        slots = SlotModel(base, targets)
        adapters = [random_adapter(slots.shapes, r, seed=r, dtype=torch.float32) for r in (2, 5)]
        slots.load(adapters, trainable=("lora_A", "lora_B"))
        batch = collate(rows, pad_token_id=0)
        with torch.no_grad():  # as the probe before the first step
            answer_losses(slots, batch)
        losses = answer_losses(slots, batch)
        slots.accumulate_gradients(sum(part.mean() for part in losses))
        gradients.append(slots.gradients.clone())
    assert reference.relative_error(gradients[0], gradients[1]) < 1e-4


def test_a_change_is_carried_beside_an_nf4_weight_that_it_cannot_be_merged_into(model):
    """The wish to merge changes nothing here: not a result, not a byte of the base."""
    before = base_bytes(model)
    slots = SlotModel(model)
    carried = random_adapter(slots.shapes, 6, seed=9, dtype=torch.float32)
    rows = [random_examples(4, seed=1)]
    chosen = TrainSettings(learning_rate=0.01, per_device_train_batch_size=4, max_steps=1)
    results = []
    for merge in (True, False):
        trained = random_adapter(slots.shapes, 2, seed=2, dtype=torch.float32)
        slots.load([trained], carried=[carried], merge=merge)
        assert all(layer.merged is None for layer in slots.layers.values())
        assert all(layer.carried is not None for layer in slots.layers.values())
        job = train_job(trained, carried=carried, local=LocalPlan(merge=merge))
        results += train(slots, [job], rows, chosen)
    merged, beside = results
    assert merged.adapter.digest() == beside.adapter.digest()
    (bare,) = train(slots, [train_job(trained)], rows, chosen)
    assert abs(bare.loss_before - beside.loss_before) > 1e-3
    slots.remove()
    after = base_bytes(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
