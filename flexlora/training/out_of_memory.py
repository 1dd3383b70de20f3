"""Handles running out of memory in a client's training.

    free       release the memory of the failed pass
    halve      halve the rows of a pass, down to one; a step has the same rows and the same mean
               gradient, in more passes
    lower      if one row does not fit: request half the rank from the next round on, and send no
               update in this one

A client never trains only the first terms of the ``T_r(G)`` that it was sent: every method would
then have to subtract that shorter start.
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

_MESSAGES = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an out-of-memory error of the card or of the machine."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _MESSAGES)


def free_memory() -> None:
    """Collect garbage and release cached CUDA memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def within_memory(work: Callable[[int], Result], size: int) -> tuple[Result | None, int]:
    """``work(size)``, halving the size while memory runs out; None if size 1 does not fit.

    Returns the result and the last size tried. Other errors are raised.
    """
    while True:
        try:
            return work(size), size
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside the block above: the error's frames reference the tensors of the failed pass.
        free_memory()
        if size == 1:
            return None, 1
        size //= 2


def train_within_memory(
    attempt: Callable[[int], TrainResult], job: TrainJob, rows_per_pass: int
) -> tuple[TrainResult, int]:
    """``attempt(rows per pass)`` for one job: its result and the rows per pass that fitted.

    If one row does not fit, the result has a cause and a lower ``asked_rank``, no factors.
    """
    result, size = within_memory(attempt, rows_per_pass)
    if result is None:
        return _rank_request(job), 1
    if size < rows_per_pass:
        note = f"out of memory with {rows_per_pass} rows in a pass: trained with {size}"
        result = replace(result, note=note)
    return result, size


def _rank_request(job: TrainJob) -> TrainResult:
    trained = job.start.for_client(job.client_id).trained
    rank = max(factors.rank for factors in trained.values())
    failure = f"out of memory at rank {rank} with 1 row in a pass"
    if rank > 1:
        cause = f"{failure}; asks for rank {rank // 2}"
    else:
        cause = f"{failure}; lower train.max-length or quantize the base"
    return TrainResult(
        client_id=job.client_id,
        rank_class=job.start.rank_class.name,
        base_round=job.start.base_round,
        digest=job.start.digest,
        asked_rank=rank // 2,
        out_of_memory=True,
        cause=cause,
    )
