"""``ranks.policy=memory``: the largest useful rank that fits the bytes a client reports as free.

A client trains with the run's batch, length, dtype and checkpointing, on the base that it reports
(``quantization``); only the rank is chosen: a power of two, at most ``planner.useful_rank`` of its
number of examples. Free bytes are measured before the base is loaded, so the prediction includes
the base and the planner's margin.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from flexlora.config.resolve import Config
from flexlora.lora.ranks import RankClass
from flexlora.planning.memory import training_memory
from flexlora.planning.model_config import read_shape
from flexlora.planning.planner import Request, halved, needed_bytes, useful_rank
from flexlora.planning.shapes import ModelShape, TrainingPlan
from flexlora.units import human_bytes

__all__ = ["memory_rank", "run_plan"]


def run_plan(config: Config) -> tuple[ModelShape, TrainingPlan]:
    """The model's shape and this run's plan, at rank 1 and without quantization.

    Raises:
        UserError: a model whose memory cannot be predicted.
    """
    shape = read_shape(config.model.name)
    shape.targets(config.lora.target_modules)
    carried_dtype = getattr(config.method, "carried_dtype", "") or config.wire.dtype
    plan = TrainingPlan(
        rank=1,
        max_length=min(config.train.max_length, shape.max_positions),
        batch=config.train.per_device_train_batch_size,
        dtype=config.model.dtype,
        carried_rank=getattr(config.method, "carried_rank", 0),
        carried_dtype="bfloat16" if carried_dtype == "bfloat16" else "float32",
        gradient_checkpointing=config.train.gradient_checkpointing,
        optim=config.train.optim,
        attention=config.model.attn_implementation,
        aligned=getattr(config.method, "gradient_batches", 0) > 0,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
    )
    return shape, plan


def memory_rank(
    shape: ModelShape,
    plan: TrainingPlan,
    *,
    free_bytes: int,
    num_examples: int,
    quantization: str,
    device: str,
) -> RankClass | str:
    """The rank class of one client, or why there is none, in one sentence."""
    if free_bytes < 1:
        return "it did not report how much memory is free, which ranks.policy=memory needs"
    unified = device.startswith("cpu")
    largest = useful_rank(num_examples)
    rank, needed = _largest_fit(shape, plan, free_bytes, largest, quantization, unified)
    if rank:
        return RankClass.of(rank)
    base = plan.dtype if quantization == "none" else quantization
    return (
        f"{human_bytes(free_bytes)} are free, {human_bytes(needed)} are needed at rank 1 on a "
        f"{base} base with train.per-device-train-batch-size={plan.batch} and "
        f"train.max-length={plan.max_length}"
    )


@lru_cache(maxsize=1024)
def _largest_fit(
    shape: ModelShape,
    plan: TrainingPlan,
    free_bytes: int,
    largest: int,
    quantization: str,
    unified: bool,
) -> tuple[int, int]:
    """The largest rank that fits and its bytes; 0 and the bytes of rank 1 if none fits."""
    request, needed = Request(memory_bytes=free_bytes), 0
    for rank in halved(largest):
        client = replace(plan, rank=rank, quantization=quantization, unified_memory=unified)
        needed = needed_bytes(training_memory(shape, client), request)
        if needed <= free_bytes:
            return rank, needed
    return 0, needed
