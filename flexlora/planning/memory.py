"""Bytes of a training step, term by term, from a model's shape alone: no weights, no torch.

Memory can peak at a few moments of a step. Each is a sum of terms; the plan's memory is the largest
sum, of ``MemoryTerms.moment``:

    loss        all activations, and the answer tokens' logits with their gradients
    backward    all activations (with checkpointing one hidden state per layer, and one layer),
                and one layer's gradients
    gradients   the first layer's backward pass, with the gradients of all factors
    optimizer   no activations; concatenated gradients or the optimizer's intermediate results
    alignment   the gradient sketches of all modules (``aligned``), and the SVD of one
    merging     a merged copy of the weights, and one module's change in float64

NF4 is half a byte a number and, doubly quantized, 8 bits and a 256th of 32 per block of 64
(QLoRA, arXiv 2305.14314): 0.127 bits more a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from flexlora.planning.activations import (
    FACTOR_BYTES,
    backward_bytes,
    kept_bytes,
    layer_bytes,
    logit_bytes,
    sketch_rows,
)
from flexlora.planning.shapes import BYTES, Linear, ModelShape, TrainingPlan

__all__ = [
    "MemoryTerms",
    "moments",
    "nf4_bytes",
    "state_bytes",
    "trained_numbers",
    "training_memory",
]

BLOCK = 64  # numbers per NF4 constant
OUTER_BLOCK = 256  # constants per second-level constant
TABLES = 4 * (16 + 256 + 1)  # a module's NF4 code, the code of its constants and their offset
# As in blockwise.py, which needs torch: 8-bit moments per scale, numbers per kernel call,
# and bytes that a CPU kernel allocates for each.
MOMENT_BLOCK, MOMENT_CHUNK, MOMENT_WORK = 256, 2**20, 20


@dataclass(frozen=True, kw_only=True)
class MemoryTerms:
    """Bytes by purpose at one moment of a step; ``total`` is their sum."""

    moment: str
    quantized_weights: int = 0
    unquantized_weights: int = 0
    merged_weights: int = 0
    trained_factors: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    carried_factors: int = 0
    received_factors: int = 0
    sketches: int = 0
    activations: int = 0
    logits: int = 0
    backward: int = 0
    dequantized: int = 0
    runtime: int = 0

    def items(self) -> tuple[tuple[str, int], ...]:
        """Name and bytes of every term, in order."""
        names = [field.name for field in fields(self) if field.name != "moment"]
        return tuple((name, getattr(self, name)) for name in names)

    @property
    def total(self) -> int:
        return sum(count for _, count in self.items())


def training_memory(shape: ModelShape, plan: TrainingPlan) -> MemoryTerms:
    """The terms at the moment of a step at which their sum is largest."""
    return max(moments(shape, plan), key=lambda terms: terms.total)


def nf4_bytes(numbers: int) -> int:
    """One weight as bitsandbytes stores it: NF4 with double quantization."""
    blocks = math.ceil(numbers / BLOCK)
    return math.ceil(numbers / 2) + blocks + 4 * math.ceil(blocks / OUTER_BLOCK) + TABLES


def trained_numbers(shape: ModelShape, rank: int, target_modules: str = "all-linear") -> int:
    """Numbers of an adapter; a rank is capped at a module's smaller side."""
    return shape.num_layers * sum(
        min(rank, x.in_features, x.out_features) * (x.in_features + x.out_features)
        for x in shape.targets(target_modules)
    )


def moments(shape: ModelShape, plan: TrainingPlan) -> Iterator[MemoryTerms]:
    """The terms at every moment that can be the peak."""
    constant = _constant_terms(shape, plan)
    factors = FACTOR_BYTES * trained_numbers(shape, plan.rank, plan.target_modules)
    layer = layer_bytes(shape, plan, aligning=plan.aligned)
    checkpoints = shape.num_layers * kept_bytes(shape, plan)
    last_norm = BYTES["float32"] * plan.tokens * shape.hidden_size
    saved = checkpoints + last_norm if plan.gradient_checkpointing else shape.num_layers * layer
    dequantized = _dequantized_bytes(shape, plan)
    workspace = max(backward_bytes(shape, plan), _adding_bytes(shape, plan))
    yield replace(constant, moment="loss", activations=saved, logits=logit_bytes(shape, plan))
    whole = checkpoints + layer if plan.gradient_checkpointing else saved
    sketches = _sketch_bytes(shape, plan)
    yield replace(
        constant,
        moment="backward",
        activations=whole,
        backward=workspace,
        sketches=sketches // shape.num_layers,
        dequantized=dequantized,
    )
    yield replace(
        constant,
        moment="alignment" if plan.aligned else "gradients",
        activations=layer,
        backward=workspace + factors,
        sketches=sketches,
        dequantized=dequantized,
    )
    if plan.aligned:
        yield replace(constant, moment="alignment", sketches=sketches + _svd_bytes(shape, plan))
    yield replace(constant, moment="optimizer", backward=_stepping_bytes(plan.optim, factors))
    if plan.merged and plan.quantization == "none":
        largest = max(x.numbers for x in shape.targets(plan.target_modules))
        yield replace(constant, moment="merging", backward=3 * 8 * largest)


def _constant_terms(shape: ModelShape, plan: TrainingPlan) -> MemoryTerms:
    """The terms that are equal at every moment."""
    numbers = trained_numbers(shape, plan.rank, plan.target_modules)
    carried = trained_numbers(shape, plan.carried_rank, plan.target_modules)
    quantized, unquantized = weight_bytes(shape, plan)
    targets = shape.num_layers * sum(x.numbers for x in shape.targets(plan.target_modules))
    merged = targets * plan.number_bytes if plan.merged and plan.quantization == "none" else 0
    return MemoryTerms(
        moment="",
        quantized_weights=quantized,
        unquantized_weights=unquantized,
        merged_weights=merged,
        trained_factors=FACTOR_BYTES * numbers,
        gradients=FACTOR_BYTES * numbers,
        optimizer_state=state_bytes(plan.optim, numbers),
        carried_factors=0 if merged else carried * (4 if plan.carried_dtype == "float32" else 2),
        received_factors=FACTOR_BYTES * (numbers + carried) if plan.unified_memory else 0,
        runtime=plan.runtime_bytes,
    )


def state_bytes(optim: str, numbers: int) -> int:
    """Bytes of an optimizer's state for ``numbers`` trained numbers.

    In 8 bits: a byte of each moment, two float32 scales per 256 numbers, two tables of 256. Paged
    moments count in full: the driver can move them to the host at a peak, but every step needs all
    of them on the card.
    """
    blocks = math.ceil(numbers / MOMENT_BLOCK)
    in_8_bits = 2 * MOMENT_BLOCK * blocks + 2 * 4 * blocks + 2 * 4 * 256
    sizes = {"sgd": 0, "adamw_torch": 2 * FACTOR_BYTES * numbers}
    return {**sizes, "adamw_8bit": in_8_bits, "paged_adamw_8bit": in_8_bits}[optim]


def _stepping_bytes(optim: str, factors: int) -> int:
    """Peak bytes of an optimizer step of factors of ``factors`` bytes.

    Concatenated gradients (twice the factors), or AdamW's intermediate results (three times); in 8
    bits a CPU kernel allocates those of one chunk.
    """
    if optim == "adamw_torch":
        return 3 * factors
    chunk = min(MOMENT_CHUNK, factors // FACTOR_BYTES) if optim.endswith("8bit") else 0
    return max(2 * factors, MOMENT_WORK * chunk)


def weight_bytes(shape: ModelShape, plan: TrainingPlan) -> tuple[int, int]:
    """Bytes of the base's weights: quantized linears, and all others.

    The output layer, embeddings, norms and biases stay in the base's dtype; so, as an upper bound,
    do parts that text does not reach.
    """
    rest = plan.number_bytes * (shape.num_parameters - shape.linear_numbers)
    if plan.quantization == "none":
        return 0, rest + plan.number_bytes * shape.linear_numbers
    sizes = {
        "nf4": lambda x: nf4_bytes(x.numbers),
        "8bit": lambda x: x.numbers + 4 * x.out_features,
    }
    return shape.num_layers * sum(map(sizes[plan.quantization], shape.linears)), rest


def _dequantized_bytes(shape: ModelShape, plan: TrainingPlan) -> int:
    """The largest linear in the base's dtype, to which quantized weights are converted."""
    if plan.quantization == "none":
        return 0
    largest = max(linear.numbers for linear in shape.linears)
    constants = 4 * math.ceil(largest / BLOCK) if plan.quantization == "nf4" else 0
    return plan.number_bytes * largest + constants


def _sketch_bytes(shape: ModelShape, plan: TrainingPlan) -> int:
    if not plan.aligned:
        return 0
    targets = shape.targets(plan.target_modules)
    return FACTOR_BYTES * shape.num_layers * sum(_rows(plan, x) * x.in_features for x in targets)


def _rows(plan: TrainingPlan, linear: Linear) -> int:
    return sketch_rows(min(plan.rank, linear.in_features, linear.out_features), linear.out_features)


def _adding_bytes(shape: ModelShape, plan: TrainingPlan) -> int:
    """Temporary bytes while one module's gradients are added to its sketch."""
    if not plan.aligned:
        return 0
    copies = plan.number_bytes != FACTOR_BYTES
    return FACTOR_BYTES * max(
        plan.tokens * (_rows(plan, x) + copies * x.in_features) + _rows(plan, x) * x.in_features
        for x in shape.targets(plan.target_modules)
    )


def _svd_bytes(shape: ModelShape, plan: TrainingPlan) -> int:
    """The largest sketch in float64, LAPACK's copy and the singular vectors."""
    return 8 * max(
        3 * _rows(plan, x) * x.in_features + 4 * _rows(plan, x) ** 2
        for x in shape.targets(plan.target_modules)
    )
