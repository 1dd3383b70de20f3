"""``--memory-limit``: whether any training fits it, and what holds the process to it.

On CUDA torch's allocator refuses what goes beyond; the trainer then halves its micro-batch or asks
for a lower rank, as on a smaller card. On the CPU nothing enforces the limit (one on the address
space would end the process, not the training): the plan is checked against it, and servers are told
it as the memory that is free.
"""

from __future__ import annotations

import torch

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.planning.devices import CPU_RUNTIME, CUDA_RUNTIME
from flexlora.planning.model_config import read_shape
from flexlora.planning.planner import Choice, Request, make_plan
from flexlora.training.models import pick_device
from flexlora.units import parse_bytes

__all__ = ["enforce", "parse_size", "smallest_plan"]


def parse_size(text: str, flag: str) -> int:
    """``6GiB`` as bytes.

    Raises:
        UserError: no number with a unit, or nothing at all of it, naming ``flag``.
    """
    try:
        size = parse_bytes(text)
    except UserError:
        size = 0
    if size < 1:
        raise UserError(f"{flag} is '{text}', expected a number and a unit, like 6GiB or 500MB.")
    return size


def smallest_plan(config: Config, limit_bytes: int) -> Choice:
    """The plan that the limit allows for this node's base: at least rank 1, one row at a time.

    Raises:
        UserError: not even that fits, with what is missing; a base that cannot be planned for.
    """
    if config.model.dtype == "float64":
        raise UserError(
            "--memory-limit plans bases in float32 and bfloat16, and model.dtype is float64; "
            "leave one of them out."
        )
    shape = read_shape(config.model.name)
    on_card = pick_device(config.engine.device).type == "cuda"
    length = config.train.max_length
    request = Request(
        memory_bytes=limit_bytes,
        max_length=min(length, shape.max_positions),
        quantization=config.model.quantization,
        attention=config.model.attn_implementation,
        bfloat16=config.model.dtype == "bfloat16",
        cuda=on_card,
        unified_memory=not on_card,
        runtime_bytes=CUDA_RUNTIME if on_card else CPU_RUNTIME,
    )
    return make_plan(shape, request)


def enforce(config: Config, limit_bytes: int) -> str:
    """Hold the process to the limit where that can be done; a sentence about what was done.

    Raises:
        UserError: a limit beyond the card's memory.
    """
    device = pick_device(config.engine.device)
    if device.type != "cuda":
        return (
            "memory limit: on the CPU nothing enforces it; plans were checked against it, and "
            "servers are told it as free memory"
        )
    total = torch.cuda.get_device_properties(device).total_memory
    if limit_bytes > total:
        raise UserError(
            f"--memory-limit is {limit_bytes:,} bytes, but the card has {total:,}; give less, or "
            "leave it out."
        )
    share = (limit_bytes - CUDA_RUNTIME) / total
    torch.cuda.set_per_process_memory_fraction(max(0.0, share), device)
    return f"memory limit: torch may take {share:.0%} of the card, the rest is CUDA's own"
