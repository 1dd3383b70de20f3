"""K slots in one pass against one adapter on the same total batch, and against clients in turn.

For K slots of b rows of T tokens each, all with AdamW, tokens a second of

    cohort    K adapters of unequal ranks in one pass: ``flexlora.training.local.train`` with K jobs
    one       the same code with one adapter and K b rows;   peft   plain PEFT with these rows
    in turn   the same code, one client after the other, one row in a pass

One adapter has the largest of the ranks. On CUDA also the peak of the allocator: the cohort's over
that of one adapter with the same rows plus what the K adapters, their gradients and their moments
take (16 bytes a number).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch

from flexlora.aggregation.engine.starts import Start
from flexlora.errors import UserError
from flexlora.simulations.benchmarks.cohort_passes import (
    SHAPES,
    Measured,
    Sweep,
    peft_pass,
    random_base,
    slot_pass,
    starts_of,
)
from flexlora.simulations.benchmarks.cohort_rows import Row
from flexlora.training.slots import SlotModel, slot_model

__all__ = ["SHAPES", "Sweep", "sweep_rows"]

ONE_TARGET, TURN_TARGET, MEMORY_TARGET = 0.8, 1.5, 1.1
BYTES_PER_NUMBER = 16  # a float32 parameter, its gradient, AdamW's two moments
Case = tuple[int, int]  # slots, rows of each


def sweep_rows(sweep: Sweep) -> list[Row]:
    """One row per K, b and way of others; what does not fit the device has none.

    Raises:
        UserError: fewer steps than can be timed, or no CUDA where it is asked for.
    """
    if sweep.steps < 2:
        raise UserError(f"--steps is {sweep.steps}, expected at least 2: one step has no distance.")
    model = random_base(sweep)
    slots = slot_model(model, "all-linear")
    starts = starts_of(slots, sweep)
    largest = max(starts, key=lambda start: start.rank_class.rank)
    one_slot = cache(lambda rows: slot_pass(slots, [largest], sweep, 1, rows))
    cohorts = dict(_fitting(sweep, lambda K, b: slot_pass(slots, starts, sweep, K, b)))
    ones = dict(_fitting(sweep, lambda K, b: one_slot(K * b)))
    in_turn = _in_turn(slots, starts, sweep)
    slots.remove()  # one base on the device, or the peaks would count another
    pefts = _by_peft(model, sweep, largest.rank_class.rank)
    rows = []
    for (K, b), cohort in cohorts.items():
        name = f"K={K}, {b} row(s)"
        rows.append(_row(f"{name}: over clients in turn", cohort, in_turn, TURN_TARGET))
        if (K, b) in ones:
            one = ones[K, b]
            rows.append(_row(f"{name}: over one adapter", cohort, one, ONE_TARGET))
            rows += _memory_rows(name, cohort, one, _adapter_bytes(starts, K))
        if (K, b) in pefts:
            rows.append(_row(f"{name}: over one by PEFT", cohort, pefts[K, b], ONE_TARGET))
    return rows


def _fitting(
    sweep: Sweep, measure: Callable[[int, int], Measured]
) -> Iterator[tuple[Case, Measured]]:
    """The cases that the device has memory for."""
    for b in sweep.slot_rows:
        for K in sweep.counts:
            try:
                yield (K, b), measure(K, b)
            except torch.OutOfMemoryError:
                print(f"K={K}, {b} row(s): out of memory")


def _in_turn(slots: SlotModel, starts: Sequence[Start], sweep: Sweep) -> Measured:
    """One client of each rank by itself, one row in a pass; the rate of them together."""
    rates = [slot_pass(slots, [start], sweep, 1, 1, 1).rate for start in starts]
    return Measured(rate=len(rates) / sum(1.0 / rate for rate in rates), peak_bytes=0.0)


def _by_peft(model: torch.nn.Module, sweep: Sweep, rank: int) -> dict[Case, Measured]:
    """Plain PEFT on the same base; nothing where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        return {}
    from flexlora.simulations.benchmarks.cohort_peers.peft_client import with_adapters

    wrapped = with_adapters(model, [rank], 16.0)
    one_pass = cache(lambda rows: peft_pass(wrapped, sweep, rows))
    return dict(_fitting(sweep, lambda K, b: one_pass(K * b)))


def _adapter_bytes(starts: Sequence[Start], count: int) -> float:
    numbers = [start.trained.num_bytes / 4 for start in starts]
    return BYTES_PER_NUMBER * sum(numbers[k % len(numbers)] for k in range(count))


def _row(name: str, cohort: Measured, other: Measured, target: float) -> Row:
    return Row(
        name=name,
        ratio=cohort.rate / other.rate,
        target=target,
        ours=cohort.rate,
        other=other.rate,
        unit="tokens/s",
    )


def _memory_rows(name: str, cohort: Measured, one: Measured, adapter_bytes: float) -> list[Row]:
    if not cohort.peak_bytes:
        return []
    allowed = one.peak_bytes + adapter_bytes
    return [
        Row(
            name=f"{name}: peak over one's plus adapters",
            ratio=cohort.peak_bytes / allowed,
            target=MEMORY_TARGET,
            at_most=True,
            ours=cohort.peak_bytes / 1e9,
            other=allowed / 1e9,
            unit="GB",
        )
    ]
