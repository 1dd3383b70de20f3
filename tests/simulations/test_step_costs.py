"""The cost of local training: held against counted operations and published measurements."""

import json
from dataclasses import replace

import pytest
import torch

from flexlora.aggregation.engine.options import choices
from flexlora.config.resolve import KEYS
from flexlora.lora.ranks import RankClass
from flexlora.planning.architectures import shape_from_config
from flexlora.planning.devices import DEVICES, Device
from flexlora.planning.memory import trained_numbers
from flexlora.planning.model_config import read_shape
from flexlora.planning.rank_policies import paper_types
from flexlora.planning.shapes import TrainingPlan
from flexlora.simulations.world.clock_models import clock_shape
from flexlora.simulations.world.rates import Rates, rates_of
from flexlora.simulations.world.step_costs import (
    LAYER_SECONDS,
    STEP_BYTES,
    UTILISATION,
    adapter_numbers,
    flops_per_token,
    train_seconds,
    training_work,
)

QWEN = "Qwen/Qwen2.5-0.5B"


def llama(hidden, intermediate, layers, heads, vocabulary=32000):
    return shape_from_config(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "vocab_size": vocabulary,
            "torch_dtype": "bfloat16",
        }
    )


def counted_flops(checkpointing):
    """Operations of one step of a real model with trained and frozen LoRA, as torch counts them."""
    import peft
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_config(config),
        peft.LoraConfig(r=4, target_modules="all-linear"),
    )
    model.add_adapter("carried", peft.LoraConfig(r=6, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "carried"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".default." in name
    model.enable_input_require_grads()  # else the first layer's inputs need no gradient
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.arange(2 * 40).reshape(2, 40) % 96
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    shape = shape_from_config({**json.loads(config.to_json_string()), "head_dim": 16})
    return counter.get_total_flops() / (2 * 40), shape


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(checkpointing):
    """But for attention, which eager code computes in full and without computing scores again."""
    counted, shape = counted_flops(checkpointing)
    again = 1 if checkpointing else 0
    plan = TrainingPlan(
        rank=4, max_length=40, gradient_checkpointing=checkpointing, answer_fraction=1.0
    )
    numbers = {
        "trained": trained_numbers(shape, 4),
        "carried": trained_numbers(shape, 6),
    }
    causal = 2 * 40 * shape.query_size * shape.num_layers
    eager = (4 + 8 + 4 * again) * 40 * shape.query_size * shape.num_layers
    ours = flops_per_token(shape, plan, length=40, **numbers)
    # Checkpointing stops as soon as nothing more is asked for: before a layer's last small product.
    expected = ours - (3.5 + again) * causal + eager
    assert counted == pytest.approx(expected, rel=3e-3 if checkpointing else 1e-6)
    for left_out in ("trained", "carried"):
        fewer = flops_per_token(shape, plan, length=40, **{**numbers, left_out: 0})
        assert fewer < 0.95 * ours


@pytest.mark.parametrize("length", [512, 4096, 6000, 32768])
def test_attention_in_a_window_is_counted_by_the_keys_that_tokens_see(length):
    """An oracle by enumeration: token t sees min(t, window) keys, 3.5 passes of 4 operations."""
    shape = clock_shape("mistralai/Mistral-7B-v0.1")
    plan = TrainingPlan(rank=8, max_length=length, answer_fraction=0.0)
    linears = 4 * shape.linear_numbers
    counted = flops_per_token(shape, plan, trained=0, carried=0, length=length) - linears
    keys = sum(min(t, shape.sliding_window) for t in range(1, length + 1)) / length
    expected = 3.5 * 4 * keys * shape.query_size * shape.num_layers
    assert counted == pytest.approx(expected, rel=2 / min(length, shape.sliding_window))


def test_a_look_is_a_pass_without_a_step():
    shape, plan = clock_shape(QWEN), TrainingPlan(rank=8, max_length=128)
    counts = {"trained": 10**6, "carried": 0, "accumulation": 2}
    looked = training_work(shape, plan, tokens=1200, steps=4, looks=2, **counts)
    stepped = training_work(shape, plan, tokens=1200, steps=6, **counts)
    assert looked.layer_passes == stepped.layer_passes == 6 * 2 * 2 * shape.num_layers
    assert looked.flops == stepped.flops
    moved = 2 * STEP_BYTES[plan.optim] * 10**6
    assert stepped.bytes_moved - looked.bytes_moved == pytest.approx(moved)


# Seconds an optimizer step of LoRA at rank 64 on an A100 80GB, 8 passes of one row, by row length:
# the README of QwenLM/Qwen, "Profiling of Memory and Speed".
QWEN_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
QWEN_SECONDS = {
    (2048, 5504, 24, 16, 151936): (1.0, 1.0, 1.1, 1.7, 3.3, 6.8),
    (4096, 11008, 32, 32, 151936): (1.2, 1.5, 2.8, 5.2, 10.1, 21.3),
    (5120, 13696, 40, 40, 152064): (1.6, 2.4, 4.4, 8.4, 17.0, 36.0),
}


@pytest.mark.parametrize("sizes", QWEN_SECONDS, ids=["1.8B", "7B", "14B"])
def test_times_are_near_those_published_for_lora_on_an_a100(sizes):
    shape, rates = llama(*sizes), rates_of(DEVICES["A100 80GB"])
    for length, measured in zip(QWEN_LENGTHS, QWEN_SECONDS[sizes], strict=True):
        plan = TrainingPlan(
            rank=64,
            max_length=length,
            dtype="bfloat16",
            gradient_checkpointing=True,
            answer_fraction=1.0,
        )
        work = training_work(
            shape,
            plan,
            trained=trained_numbers(shape, 64),
            carried=0,
            tokens=8 * length,
            steps=1,
            accumulation=8,
        )
        assert 1 / 1.5 < train_seconds(work, rates, "bfloat16") / measured < 1.5


# Milliseconds a pass of LoRA at rank 8 on an A100 40GB, one row of Alpaca: LitGPT's
# tutorials/resource-tables.md, bfloat16 and bnb.nf4-dq.
@pytest.mark.parametrize(
    ("sizes", "plain", "nf4"),
    [((4096, 11008, 32, 32), 141.6, 229.8), ((5120, 13824, 40, 40), 191.4, 393.0)],
    ids=["7B", "13B"],
)
def test_a_4_bit_base_costs_what_was_published_for_it(sizes, plain, nf4):
    shape, rates = llama(*sizes), rates_of(DEVICES["A100 40GB"])
    took = {}
    for quantization in ("none", "nf4"):
        plan = TrainingPlan(rank=8, max_length=110, dtype="bfloat16", quantization=quantization)
        work = training_work(
            shape, plan, trained=trained_numbers(shape, 8), carried=0, tokens=110, steps=1
        )
        took[quantization] = 1000 * train_seconds(work, rates, "bfloat16")
    assert took["none"] == pytest.approx(plain, rel=0.25)
    assert took["nf4"] == pytest.approx(nf4, rel=0.25)
    assert took["nf4"] - took["none"] == pytest.approx(nf4 - plain, rel=0.25)


def test_the_roofline_takes_the_slowest_of_three():
    shape = read_shape("embedded")
    plan = TrainingPlan(rank=8, max_length=128, batch=8)
    work = training_work(shape, plan, trained=1000, carried=0, tokens=8000, steps=10)
    fast = Rates(float32_tflops=1e6, tensor_tflops=1e6, bandwidth_gbs=1e9, watts=1)
    assert train_seconds(work, fast, "float32") == pytest.approx(10 * 2 * 4 * LAYER_SECONDS)
    weak, narrow = replace(fast, float32_tflops=1e-4), replace(fast, bandwidth_gbs=1e-2)
    assert train_seconds(work, weak, "float32") == pytest.approx(work.flops / (UTILISATION * 1e8))
    assert train_seconds(work, weak, "bfloat16") < train_seconds(work, weak, "float32")
    assert train_seconds(work, narrow, "float32") == pytest.approx(work.bytes_moved / 1e7)


def test_every_optimizer_of_the_configuration_has_its_bytes():
    assert set(STEP_BYTES) == set(choices(KEYS["train.optim"].annotation))


def test_no_steps_are_no_work():
    shape, plan = read_shape("embedded"), TrainingPlan(rank=8, max_length=128)
    work = training_work(shape, plan, trained=9, carried=9, tokens=0, steps=0)
    assert train_seconds(work, rates_of(DEVICES["T4"]), "float32") == 0.0


@pytest.mark.parametrize("rank", [1, 8, 300])
@pytest.mark.parametrize("modules", ["all-linear", "q_proj,v_proj"])
def test_a_plain_rank_class_has_the_numbers_that_the_planner_counts(rank, modules):
    shape = clock_shape(QWEN)
    counted = adapter_numbers(shape, RankClass.of(rank), modules)
    assert counted == trained_numbers(shape, rank, modules)


def test_the_papers_third_type_is_wide_in_the_mlp_alone():
    shape, third = read_shape("embedded"), paper_types(0.125)[2]
    attention = {x.name for x in shape.linears if "attn" in x.name}
    by_hand = shape.num_layers * sum(
        (4 if x.name in attention else 25) * (x.in_features + x.out_features) for x in shape.linears
    )
    assert adapter_numbers(shape, third, "all-linear") == by_hand


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_every_profile_has_rates_and_says_which_nobody_published(device):
    rates = rates_of(device)
    for name in ("float32_tflops", "tensor_tflops", "bandwidth_gbs"):
        published = getattr(device, name)
        assert (name in rates.derived) == (published is None)
        assert published in (None, getattr(rates, name)) and getattr(rates, name) > 0
    assert rates.watts == device.watts
    assert 1 <= rates.tensor_tflops / rates.float32_tflops <= 33
    assert 0.05 <= rates.float32_tflops <= 150 and 10 <= rates.bandwidth_gbs <= 5000


def test_a_device_of_which_nothing_is_known_is_refused():
    with pytest.raises(ValueError, match="thing has no float32_tflops, bandwidth_gbs or watts"):
        rates_of(Device(name="thing", memory_gib=8))
