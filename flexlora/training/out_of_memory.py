"""A client whose card is too small for one pass, and what it does about it.

    free       drop what the failed pass held
    halve      the rows of a pass, again and again down to one; a step still has the same rows, so
               its gradient is the same mean, in more passes
    ask        for half of its rank from the next round on, and sit this one out

It does not train a part of what it was sent: a client that started from the first terms of
``T_r(G)`` alone would have to be subtracted as such, by every method, so its update is left out.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from flexlora.wire.jobs import TrainJob, TrainResult

__all__ = ["free_memory", "is_out_of_memory", "train_within_memory", "within_memory"]

Result = TypeVar("Result")

_TOLD = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on the card or on the machine."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _TOLD)


def free_memory() -> None:
    """Give back what nothing refers to any more, to the card too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def within_memory(work: Callable[[int], Result], size: int) -> tuple[Result | None, int]:
    """``work(size)``, with the size halved for as long as memory runs out; at 1 row: None.

    Returns the result and the last size that was tried. Other errors pass.
    """
    while True:
        try:
            return work(size), size
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside the block above: the error's frames hold the pass that was too large.
        free_memory()
        if size == 1:
            return None, 1
        size //= 2


def train_within_memory(
    attempt: Callable[[int], TrainResult], job: TrainJob, rows_per_pass: int
) -> tuple[TrainResult, int]:
    """``attempt(rows in a pass)`` for one job; its result and how many rows it took in the end.

    Without memory for a single row the result holds no factors, says so, and asks for a lower rank.
    """
    result, size = within_memory(attempt, rows_per_pass)
    if result is None:
        return _asking(job), 1
    if size < rows_per_pass:
        note = f"out of memory with {rows_per_pass} rows in a pass: trained with {size}"
        result = replace(result, note=note)
    return result, size


def _asking(job: TrainJob) -> TrainResult:
    trained = job.start.for_client(job.client_id).trained
    rank = max(factors.rank for factors in trained.values())
    told = f"out of memory at rank {rank} with 1 row in a pass"
    if rank > 1:
        cause = f"{told}; asks for rank {rank // 2}"
    else:
        cause = f"{told}; lower train.max-length or quantize the base"
    return TrainResult(
        client_id=job.client_id,
        rank_class=job.start.rank_class.name,
        base_round=job.start.base_round,
        digest=job.start.digest,
        asked_rank=rank // 2,
        out_of_memory=True,
        cause=cause,
    )
