"""The server's work on one module, against the ways of others: time, memory, and its error.

    python -m flexlora.simulations.benchmarks.aggregation [--json FILE] [--smoke]
        [--threads N] [--clock wall|cpu] [--only sum round rate memory]

    sum      16 clients, four each of ranks 4, 8, 16, 64: everything kept. Baselines: the dense sum
             and torch's SVD of it, and QR of the stacks. Error: |M~ - M| / |M|
    round    80 clients of FlexLoRA's heavy tails, the top 200 kept. Baseline: the dense sum and its
             SVD. Error: |M - M~| / |M - M_200| - 1, at most 1e-4
    rate     the dense sum's operations per second over this machine's best matrix product
    memory   the peak of a round of 1,613 clients over that of 100 (at most the target)

A ratio is the baseline's time over ours, both measured in this run and both the best of
``--repeats``. On a busy machine take one thread and ``--clock cpu``: waiting for a core would count
for whoever waited. Errors are taken in float64 against the float64 sum.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.table import Table
from torch import Tensor

from flexlora.algebra.decompose import Decomposition, MatrixSum, decompose, fold
from flexlora.report.console import make_console
from flexlora.simulations.benchmarks.aggregation_cases import (
    LIGHT,
    STRONG,
    Mix,
    client_terms,
    dense_way,
    stack_qr_way,
)

__all__ = ["AggregationRow", "main"]

TOLERANCE = 1e-4
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AggregationRow:
    """One measurement; ``ratio`` is to be at least ``target``, for memory at most."""

    name: str
    ratio: float
    target: float
    error: float
    allowed_error: float
    at_most: bool = False
    seconds: float = 0.0
    baseline_seconds: float = 0.0
    route: str = ""
    tail: float = 0.0  # share of the energy beyond the directions that are kept

    @property
    def met(self) -> bool:
        reached = self.ratio <= self.target if self.at_most else self.ratio >= self.target
        return reached and self.error <= self.allowed_error


def main(arguments: Sequence[str] | None = None) -> list[AggregationRow]:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    scale = 16 if options.smoke else 1
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    timer = Timer(clock=clock, repeats=options.repeats)
    parts: dict[str, Callable[[], list[AggregationRow]]] = {
        "sum": lambda: _sum_rows(scale, timer),
        "round": lambda: _round_rows(scale, timer),
        "rate": lambda: [_rate_row(scale, timer)],
        "memory": lambda: [_memory_row(scale, options.threads)],
    }
    rows = [row for part in options.only or parts for row in parts[part]()]
    _print(rows, options.threads)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--smoke", action="store_true", help="shapes a sixteenth of the size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=("sum", "round", "rate", "memory"))
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread on a busy machine"
    )
    parser.add_argument("--repeats", type=int, default=3)
    return parser


@dataclass(frozen=True, kw_only=True)
class Timer:
    """The fastest of ``repeats`` calls by one clock, the same for both sides of a ratio."""

    clock: Callable[[], float]
    repeats: int

    def best(self, function: Callable[..., T], *arguments: object) -> tuple[float, T]:
        """Seconds of the fastest call, and what it returned."""
        seconds = []
        for _ in range(self.repeats):
            began = self.clock()
            result = function(*arguments)
            seconds.append(self.clock() - began)
        return min(seconds), result


def _ours(matrix: MatrixSum, rank: int) -> Decomposition:
    found = decompose({"module": matrix}, max_rank=rank, dtype=torch.float32, tolerance=TOLERANCE)
    return found["module"]


def _distance(M: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> float:
    U, S, Vh = (part.double() for part in parts)
    return float((M - (U * S) @ Vh).norm())


def _folded(matrix: MatrixSum) -> Tensor:
    return fold(torch.zeros(matrix.shape), matrix.terms, matrix.shape)


def _exact(matrix: MatrixSum) -> Tensor:
    return matrix.to_dense(torch.float64)


def _sum_rows(scale: int, timer: Timer) -> list[AggregationRow]:
    ranks = [max(1, rank // scale) for rank in (4, 8, 16, 64) for _ in range(4)]
    rows = []
    for shape in ((4096 // scale, 4096 // scale), (4096 // scale, 11008 // scale)):
        rows += _one_sum(shape, ranks, timer)
    return rows


def _one_sum(shape: tuple[int, int], ranks: list[int], timer: Timer) -> list[AggregationRow]:
    matrix, rank = client_terms(shape, ranks, "gaussian", seed=shape[1]), sum(ranks)
    M = _exact(matrix)
    size = float(M.norm())
    seconds, ours = timer.best(_ours, matrix, rank)
    stack_seconds, stacked = timer.best(stack_qr_way, matrix, rank)
    dense_seconds, _ = timer.best(dense_way, matrix, rank)
    ways = (
        ("dense SVD", 60.0, dense_seconds, 1e-5),
        ("stacked QR", 1.0, stack_seconds, _distance(M, stacked) / size),
    )
    return [
        AggregationRow(
            name=f"sum {shape[0]}x{shape[1]}, R={rank} : {way}",
            ratio=baseline / seconds,
            target=target,
            error=_distance(M, (ours.svd.U, ours.svd.S, ours.svd.Vh)) / size,
            allowed_error=allowed,
            seconds=seconds,
            baseline_seconds=baseline,
            route=ours.route,
        )
        for way, target, baseline, allowed in ways
    ]


def _round_rows(scale: int, timer: Timer) -> list[AggregationRow]:
    shapes = ((2048 // scale, 2048 // scale), (2048 // scale, 5504 // scale))
    return [
        _one_round(mix, shape, kind, target, scale, timer)
        for mix, target in ((LIGHT, 5.0), (STRONG, 1.5))
        for shape in shapes
        for kind in ("noisy", "gaussian")
    ]


def _one_round(
    mix: Mix, shape: tuple[int, int], kind: str, target: float, scale: int, timer: Timer
) -> AggregationRow:
    rank, ranks = 200 // scale, mix.ranks(mlp=shape[0] != shape[1], scale=scale)
    matrix = client_terms(shape, ranks, kind, seed=shape[1])
    M = _exact(matrix)
    energies = torch.linalg.eigvalsh(M @ M.T).flip(0)
    tail = float(energies[rank:].sum())
    seconds, ours = timer.best(_ours, matrix, rank)
    dense_seconds, _ = timer.best(dense_way, matrix, rank)
    missed = _distance(M, (ours.svd.U, ours.svd.S, ours.svd.Vh))
    return AggregationRow(
        name=f"round {mix.name} {shape[0]}x{shape[1]}, R={sum(ranks)}, {kind}",
        ratio=dense_seconds / seconds,
        target=target,
        error=missed / tail**0.5 - 1.0,
        allowed_error=TOLERANCE,
        seconds=seconds,
        baseline_seconds=dense_seconds,
        route=ours.route,
        tail=tail / float(energies.sum()),
    )


def _rate_row(scale: int, timer: Timer) -> AggregationRow:
    side = 2048 // scale
    ranks = STRONG.ranks(mlp=False, scale=scale)
    matrix = client_terms((side, side), ranks, "gaussian", seed=1)
    square = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    product_seconds, _ = timer.best(torch.matmul, square, square)
    seconds, total = timer.best(_folded, matrix)
    M = _exact(matrix)
    best = 2.0 * side**3 / product_seconds
    return AggregationRow(
        name=f"rate of the dense sum {side}x{side}, R={sum(ranks)}",
        ratio=2.0 * side * side * sum(ranks) / seconds / best,
        target=0.5,
        error=float((total - M).norm() / M.norm()),
        allowed_error=1e-5,
        seconds=seconds,
        baseline_seconds=seconds * best / 1e9,
        route=f"{best / 1e9:.0f} GF/s",
    )


def _memory_row(scale: int, threads: int) -> AggregationRow:
    few, many = (100, 1613) if scale == 1 else (10, 40)
    side = 2048 if scale == 1 else 1024  # smaller ones vanish in the allocator's reserve
    peaks = [_peak_in_subprocess(count, side, threads) for count in (few, many)]
    return AggregationRow(
        name=f"memory of {many} clients over {few}",
        ratio=peaks[1] / peaks[0],
        target=1.25,
        at_most=True,
        error=0.0,
        allowed_error=0.0,
        route=f"{peaks[0]:.0f} MB -> {peaks[1]:.0f} MB",
    )


def _peak_in_subprocess(clients: int, side: int, threads: int) -> float:
    name = "flexlora.simulations.benchmarks.aggregation_memory"
    command = [sys.executable, "-m", name, str(clients), str(side)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown, accumulators = float(done.stdout), 2 * 4 * side * side / 1e6
    if grown < accumulators:
        raise RuntimeError(
            f"the peak grew by {grown} MB over {clients} clients, expected at least the two "
            f"accumulators' {accumulators:.1f} MB. Was the peak already higher before the round?"
        )
    return grown


def _print(rows: Sequence[AggregationRow], threads: int) -> None:
    table = Table(title=f"aggregation, {threads} thread(s)", caption=f"torch {torch.__version__}")
    for column in (
        "what",
        "ours s",
        "other s",
        "ratio",
        "target",
        "error",
        "allowed",
        "tail",
        "by",
    ):
        table.add_column(column, justify="left" if column in ("what", "by") else "right")
    table.add_column("met")
    for row in rows:
        timed = not row.at_most and "GF" not in row.route
        table.add_row(
            row.name,
            f"{row.seconds:.3f}" if row.seconds else "",
            f"{row.baseline_seconds:.3f}" if timed else "",
            f"{row.ratio:.2f}",
            f"{'<=' if row.at_most else '>='} {row.target:g}",
            f"{row.error:.1e}",
            f"{row.allowed_error:.1e}",
            f"{row.tail:.1e}" if row.tail else "",
            row.route,
            "yes" if row.met else "no",
        )
    make_console().print(table)


if __name__ == "__main__":
    main()
