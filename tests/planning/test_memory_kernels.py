"""Bytes of the kernels one may choose: eager attention's scores, moments in 8 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import families
from builders import random_adapter
from flexlora.config.resolve import Config
from flexlora.planning.activations import layer_bytes
from flexlora.planning.architectures import FAMILIES, shape_from_config
from flexlora.planning.memory import trained_numbers, training_memory
from flexlora.planning.memory_ranks import run_plan
from flexlora.planning.shapes import TrainingPlan
from flexlora.simulations.benchmarks import memory_case


def adapter(shapes):
    return random_adapter(shapes, 4, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_attention_keeps_its_scores_as_autograd_does(family, dtype):
    config = families.config_of(family, _attn_implementation="eager")
    shape = shape_from_config(config.to_dict())
    plan = TrainingPlan(
        rank=4, max_length=families.LENGTH, batch=families.ROWS, dtype=dtype, attention="eager"
    )
    logits = plan.answer_tokens * shape.vocab_size
    logits *= 4 + (plan.number_bytes if shape.capped_logits else 0)
    model = families.model_of(config, dtype)
    assert model.config._attn_implementation == "eager"
    saved = families.saved_bytes(model, adapter)
    assert shape.num_layers * layer_bytes(shape, plan) + logits == pytest.approx(saved, rel=0.006)
    fused = replace(plan, attention="flash_attention_2")
    without = shape.num_layers * layer_bytes(shape, fused) + logits
    assert without < 0.97 * saved, "the scores would not be seen"


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_one_row_of_eager_attention_keeps_views_where_several_keep_copies(family):
    config = families.config_of(family, _attn_implementation="eager")
    plan = TrainingPlan(rank=4, max_length=families.LENGTH, attention="eager")
    logits = 4 * plan.answer_tokens * families.VOCAB
    saved = families.saved_bytes(families.model_of(config), adapter, rows=1)
    shape = shape_from_config(config.to_dict())
    predicted = shape.num_layers * layer_bytes(shape, plan) + logits
    assert predicted == pytest.approx(saved, rel=0.01)


def test_8_bit_moments_take_a_quarter_of_the_room_of_32_bit_ones():
    shape = families.published("llama-2-7b")
    plan = TrainingPlan(rank=64, max_length=256, quantization="nf4", dtype="bfloat16")
    terms = {
        optim: training_memory(shape, replace(plan, optim=optim))
        for optim in ("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "sgd")
    }
    numbers = trained_numbers(shape, 64)
    assert terms["adamw_8bit"].optimizer_state == pytest.approx((2 + 8 / 256) * numbers, rel=1e-4)
    assert terms["paged_adamw_8bit"] == terms["adamw_8bit"]
    assert terms["adamw_torch"].optimizer_state == 8 * numbers
    saved = terms["adamw_torch"].total - terms["adamw_8bit"].total
    assert saved == pytest.approx(0.95e9, rel=0.01) and terms["sgd"].optimizer_state == 0


LONG = {"attention": "eager", "max_length": 256, "batch": 1}
PLANS = {
    "8-bit moments": {"rank": 64, "batch": 1, "optim": "adamw_8bit"},
    "eager": {"attention": "eager"},
    "eager, long rows": LONG,
    "eager, long rows, checkpointing": {**LONG, "gradient_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "bfloat16"), ("gemma2", "bfloat16")],
)
def test_the_peak_of_a_whole_training_is_the_predicted_one(name, family, dtype):
    options = {"rank": 4, "batch": families.ROWS, "max_length": families.LENGTH, **PLANS[name]}
    plan = TrainingPlan(dtype=dtype, unified_memory=True, **options)
    asked = {} if plan.attention == "auto" else {"_attn_implementation": plan.attention}
    config = families.config_of(family, **asked)
    terms = training_memory(shape_from_config(config.to_dict()), plan)
    base = families.base_of(families.model_of(config, dtype))
    memory_case.train_once(base, plan, families.VOCAB)  # the second has nothing left to set up
    peak = families.peak_bytes(lambda: memory_case.train_once(base, plan, families.VOCAB))
    assert terms.total - terms.unquantized_weights == pytest.approx(peak, rel=0.08)


def test_a_run_is_planned_with_the_kernels_that_it_asks_for():
    chosen = ("train.optim=adamw_8bit", "model.attn-implementation=eager")
    shape, plan = run_plan(Config.resolve(sets=chosen))
    _, plain = run_plan(Config.resolve())
    assert (plan.optim, plan.attention) == ("adamw_8bit", "eager")
    assert (plain.optim, plain.attention) == ("adamw_torch", "auto")
    scores = shape.num_heads * plan.max_length**2 * plan.batch * 4 * shape.num_layers
    more = training_memory(shape, plan).activations - training_memory(shape, plain).activations
    assert more > 0.9 * scores
