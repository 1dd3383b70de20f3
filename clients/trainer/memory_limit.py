"""``--memory-limit``: check that some training fits it, and enforce it where torch can.

On CUDA torch's allocator refuses more than the limit; the trainer then halves its micro-batch or
asks for a lower rank, as on a smaller card. On the CPU nothing enforces it (a limit on the address
space would end the process): it bounds the plan, and servers see it as the free memory.
"""

from __future__ import annotations

import torch

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.planning.devices import CPU_RUNTIME, CUDA_RUNTIME
from flexlora.planning.model_config import read_shape
from flexlora.planning.planner import Choice, Request, make_plan
from flexlora.training.models import pick_device

__all__ = ["enforce", "smallest_plan"]


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


def enforce(config: Config, limit_bytes: int) -> str:
    """Apply the limit to torch's allocator on CUDA; returns a sentence that says what was done.

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
    share = max(0.0, (limit_bytes - CUDA_RUNTIME) / total)
    torch.cuda.set_per_process_memory_fraction(share, device)
    return f"memory limit: torch may take {share:.0%} of the card, the rest is CUDA's own"
