"""``request.memory``, or ``--memory-limit``: plan trainings within it, and enforce it on CUDA.

On CUDA torch's allocator refuses more than the limit; the trainer then halves its micro-batch or
asks for a lower rank, as on a smaller card. On the CPU nothing can enforce it (a limit on the
address space would end the process): each training is planned, is given as many rows in a pass as
the plan has room for, and is refused where not even one row fits. Servers see the limit as the
node's free memory.
"""

from __future__ import annotations

import math

import torch

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter
from flexlora.planning.devices import CPU_RUNTIME, CUDA_RUNTIME
from flexlora.planning.memory import trained_numbers, training_memory
from flexlora.planning.model_config import read_shape
from flexlora.planning.planner import Choice, Request, halved, make_plan
from flexlora.planning.shapes import ModelShape, TrainingPlan
from flexlora.training.models import pick_device
from flexlora.units import human_bytes
from flexlora.wire.jobs import TrainJob

__all__ = ["enforce", "rows_that_fit", "smallest_plan"]


def smallest_plan(config: Config, limit_bytes: int) -> Choice:
    """The plan within the limit for the node's base: at least rank 1, one row at a time.

    Raises:
        UserError: not even that fits, with the bytes that are missing; a base in float64.
    """
    if config.model.dtype == "float64":
        raise UserError(
            "--memory-limit plans bases in float32 and bfloat16, and model.dtype is float64; "
            "leave one of them out."
        )
    shape = read_shape(config.model.name)
    on_card = pick_device(config.engine.device).type == "cuda"
    request = Request(
        memory_bytes=limit_bytes,
        max_length=min(config.train.max_length, shape.max_positions),
        quantization=config.model.quantization,
        attention=config.model.attn_implementation,
        bfloat16=config.model.dtype == "bfloat16",
        cuda=on_card,
        unified_memory=not on_card,
        runtime_bytes=CUDA_RUNTIME if on_card else CPU_RUNTIME,
    )
    return make_plan(shape, request)


def rows_that_fit(config: Config, job: TrainJob, limit_bytes: int) -> int:
    """Rows in a pass of a training on the CPU within the limit: the batch, or a half of it, ...

    Ranks of different modules count as the one rank that has as many numbers.

    Raises:
        UserError: not even one row fits, with the bytes that it takes.
    """
    shape, start = read_shape(config.model.name), job.start.for_client(job.client_id)
    targets = _planned_targets(shape, config.lora.target_modules)
    numbers = trained_numbers(shape, 1, targets)
    needed = 0
    for rows in halved(config.train.per_device_train_batch_size):
        plan = TrainingPlan(
            rank=_rank_of(start.trained, numbers),
            carried_rank=_rank_of(start.carried, numbers) if start.carried else 0,
            carried_dtype=start.carried_dtype or "float32",
            max_length=min(config.train.max_length, shape.max_positions),
            batch=rows,
            quantization=config.model.quantization,
            dtype=config.model.dtype,
            gradient_checkpointing=config.train.gradient_checkpointing,
            optim=config.train.optim,
            attention=config.model.attn_implementation,
            aligned=job.start.local.gradient_batches > 0,
            merged=job.start.local.merge,
            lora_dropout=config.lora.dropout,
            target_modules=targets,
            unified_memory=True,
            runtime_bytes=CPU_RUNTIME,
        )
        needed = training_memory(shape, plan).total
        if needed <= limit_bytes:
            return rows
    raise UserError(
        f"a training at rank {plan.rank} with one row of {plan.max_length} tokens in a pass takes "
        f"{human_bytes(needed)}, and this node's owner allows {human_bytes(limit_bytes)} at most "
        "(request.memory)."
    )


def _planned_targets(shape: ModelShape, target_modules: str) -> str:
    """The planner knows targets by name; by a regular expression it plans for all linears."""
    try:
        shape.targets(target_modules)
    except UserError:
        return "all-linear"
    return target_modules


def _rank_of(adapter: Adapter, numbers: int) -> int:
    """The rank at which all targets have as many numbers; ``numbers`` are those of rank 1."""
    held = sum(factors.lora_A.numel() + factors.lora_B.numel() for factors in adapter.values())
    return max(1, math.ceil(held / numbers))


def enforce(config: Config, limit_bytes: int) -> str:
    """Apply the limit to torch's allocator on CUDA; returns a sentence that says what was done.

    Raises:
        UserError: a limit beyond the card's memory.
    """
    device = pick_device(config.engine.device)
    if device.type != "cuda":
        return (
            "memory limit: on the CPU nothing enforces it; trainings are planned within it, and "
            "the limit is reported to servers as free memory"
        )
    total = torch.cuda.get_device_properties(device).total_memory
    if limit_bytes > total:
        raise UserError(
            f"--memory-limit is {limit_bytes:,} bytes, but the card has {total:,}; give less, or "
            "leave it out."
        )
    share = max(0.0, (limit_bytes - CUDA_RUNTIME) / total)
    torch.cuda.set_per_process_memory_fraction(share, device)
    return f"memory limit: torch may take {share:.0%} of the card, the rest is CUDA's own"
