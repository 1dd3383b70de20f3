"""What local training costs a device: operations and bytes of a run of steps, and their time.

With N numbers in the linears of the layers, one pass of n tokens in rows of T takes

    forward             2 N n, and 4 k q n L in attention: q the width of all heads, k the keys that
                        a token sees in the mean, T / 2 or w - w^2 / 2T in a window of w < T
    backward            2 N n for the gradients of inputs: frozen weights have none of their own;
                        2.5 times the forward's attention, whose kernel computes the scores again
    LoRA factors        6 a number and token: forward, input's gradient, own gradient
    carried factors     4 a number and token: forward, input's gradient
    output layer        4 a number, for the tokens of answers alone
    checkpointing       the layers' forward pass once more

A pass goes through all weights two or three times (``traversals``), writes activations and reads
them again, and a step moves the optimizer's state. Roofline, with a floor:

    seconds = max(operations / (UTILISATION * peak), bytes / bandwidth, LAYER_SECONDS * layers
              * traversals * passes) + dequantization

The three constants are of eager PyTorch with LoRA on NVIDIA's cards, measured by others:

    UTILISATION     Qwen's README, LoRA of rank 64 on an A100, one row a pass, checkpointing: 0.31
                    to 0.56 of the peak wherever arithmetic binds; all of its 18 times, from 256 to
                    8,192 tokens and 1.8B to 14B, are met within a factor of 1.5 (tests)
    LAYER_SECONDS   the same table, 1.8B: 1.7 ms a layer and traversal for short rows, whatever
                    their length; LitGPT's resource tables: 2.0 to 2.4 ms
    DEQUANTIZATION  LitGPT's tables, NF4 with double quantization less none: 5.9 to 8.0 ps a number
                    and traversal on an A100, 14.7 to 15.0 on an A10G, or 8.8 to 12.4 bytes of
                    either card's bandwidth; bitsandbytes before its kernels for short passes.
                    That 8-bit costs the same is assumed

On processors they are assumed. One report of LoRA on an RTX 4060 (arXiv 2509.12229) is 2 to 4 times
slower than this; no laptop or phone was measured for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from flexlora.lora.ranks import RankClass
from flexlora.planning.activations import layer_bytes
from flexlora.planning.shapes import ModelShape, TrainingPlan
from flexlora.simulations.world.rates import Rates

__all__ = ["Work", "adapter_numbers", "train_seconds", "training_work"]

UTILISATION = 0.45
LAYER_SECONDS = 0.002
DEQUANTIZATION = 10  # bytes moved a number and traversal, at 16 bits
FACTOR_BYTES = 4
# Bytes read and written a trained number and step: the gradient once, the rest twice.
STEP_BYTES = {"adamw_torch": 28, "sgd": 12, "adamw_8bit": 16, "paged_adamw_8bit": 16}


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one training, on any device; ``layer_passes`` counts traversals of layers."""

    flops: float
    bytes_moved: float
    dequantized_bytes: float
    layer_passes: int


def training_work(
    shape: ModelShape,
    plan: TrainingPlan,
    *,
    trained: int,
    carried: int,
    tokens: int,
    steps: int,
    accumulation: int = 1,
    looks: int = 0,
) -> Work:
    """The work of ``steps`` steps of ``accumulation`` passes over ``tokens`` tokens in all.

    ``looks`` are batches of a step's size of which only the gradient is taken, among the tokens.
    ``plan`` says how one pass trains; its ``max_length`` is not read, since the mean length of the
    padded rows follows from the tokens. ``trained`` and ``carried`` are numbers in factors.
    """
    if not tokens or not steps:
        return Work(flops=0.0, bytes_moved=0.0, dequantized_bytes=0.0, layer_passes=0)
    passes = (steps + looks) * accumulation
    length = max(1, math.ceil(tokens / (passes * plan.batch)))
    moved = passes * _pass_bytes(shape, replace(plan, max_length=length), trained, carried)
    layer_passes = passes * _traversals(plan) * shape.num_layers
    quantized = 0 if plan.quantization == "none" else DEQUANTIZATION * plan.number_bytes / 2
    return Work(
        flops=tokens
        * flops_per_token(shape, plan, trained=trained, carried=carried, length=length),
        bytes_moved=moved + steps * STEP_BYTES[plan.optim] * trained,
        dequantized_bytes=quantized * passes * _traversals(plan) * shape.linear_numbers,
        layer_passes=layer_passes,
    )


def _traversals(plan: TrainingPlan) -> int:
    return 3 if plan.gradient_checkpointing else 2


def _pass_bytes(shape: ModelShape, plan: TrainingPlan, trained: int, carried: int) -> int:
    """Weights and factors read in every traversal, activations written once and read once."""
    weights = _traversals(plan) * shape.linear_numbers + 2 * _head(shape)
    carried_bytes = 4 if plan.carried_dtype == "float32" else 2
    factors = FACTOR_BYTES * trained + carried_bytes * carried
    activations = 2 * shape.num_layers * layer_bytes(shape, plan)
    return plan.number_bytes * weights + _traversals(plan) * factors + activations


def flops_per_token(
    shape: ModelShape, plan: TrainingPlan, *, trained: int, carried: int, length: int
) -> float:
    """Operations a token of one pass, forward and backward."""
    again = 1 if plan.gradient_checkpointing else 0
    window = min(length, shape.sliding_window or length)
    keys = window - window**2 / (2 * length)
    attention = 4 * keys * shape.query_size * shape.num_layers
    return (
        (4 + 2 * again) * shape.linear_numbers
        + (1 + 2.5 + again) * attention
        + (6 + 2 * again) * trained
        + (4 + 2 * again) * carried
        + 4 * plan.answer_fraction * _head(shape)
    )


def _head(shape: ModelShape) -> int:
    """Numbers of the output layer, whether or not they are the embedding's too."""
    return shape.vocab_size * shape.hidden_size


@lru_cache(maxsize=1024)
def adapter_numbers(shape: ModelShape, rank_class: RankClass, target_modules: str) -> int:
    """Numbers in the factors that a rank class trains; a rank is capped at the smaller side.

    A rank class without a pattern has ``memory.trained_numbers`` at its rank.
    """
    return sum(
        rank_class.rank_of(f"layers.{layer}.{x.name}", x.out_features, x.in_features)
        * (x.in_features + x.out_features)
        for layer in range(shape.num_layers)
        for x in shape.targets(target_modules)
    )


def train_seconds(work: Work, rates: Rates, dtype: str) -> float:
    """The time of ``work`` on a device, in the base's dtype."""
    bandwidth = 1e9 * rates.bandwidth_gbs
    longest = max(
        work.flops / (1e12 * UTILISATION * rates.tflops(dtype)),
        work.bytes_moved / bandwidth,
        LAYER_SECONDS * work.layer_passes,
    )
    return longest + work.dequantized_bytes / bandwidth
