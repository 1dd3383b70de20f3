"""Predicted against measured memory of local training: the planner's promise, held to account.

    python -m flexlora.simulations.benchmarks.memory [--json FILE] [--smoke] [--threads N]

Random Llamas of 20M to 300M parameters (on a GPU up to 7B), each loaded and trained in a process
of its own; the prediction is made from the configuration alone. What is measured is the growth of
the peak over the process's own baseline. On a CPU that is the resident set: glibc is set to give
every block of 64 KiB or more back when it is freed, so that the set is what is alive and not what
an allocator keeps for later. On a GPU it is what torch allocated at its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from flexlora.planning.architectures import shape_from_config
from flexlora.planning.memory import MemoryTerms, training_memory
from flexlora.planning.shapes import TrainingPlan
from flexlora.report.console import make_console
from flexlora.simulations.benchmarks.memory_case import LlamaCase

__all__ = ["MemoryRow", "cases", "main"]

SMALLEST = 300e6  # below it, what the interpreter itself takes and frees would be seen
ALLOWED = {"cpu": 0.15, "cuda": 0.10}
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}

# hidden, layers, intermediate, heads, key-value heads, vocabulary
LLAMAS = {
    "20M": (384, 8, 1024, 6, 6, 8192),
    "60M": (640, 10, 1728, 10, 5, 8192),
    "150M": (896, 12, 2432, 14, 7, 16384),
    "300M": (1024, 20, 2816, 16, 8, 32000),
    "1B": (2048, 16, 8192, 32, 8, 32000),
    "7B": (4096, 32, 11008, 32, 32, 32000),
}


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One measurement; ``ratio`` is predicted over measured, ``error`` its distance from 1."""

    name: str
    predicted: int
    measured: int
    baseline: int
    moment: str
    target: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def error(self) -> float:
        return abs(self.ratio - 1.0)

    @property
    def met(self) -> bool:
        return self.error <= self.target


def _case(size: str, device: str, **plan: Any) -> LlamaCase:
    hidden, layers, intermediate, heads, key_value_heads, vocabulary = LLAMAS[size]
    return LlamaCase(
        hidden_size=hidden,
        num_layers=layers,
        intermediate_size=intermediate,
        heads=heads,
        key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        plan=TrainingPlan(unified_memory=device == "cpu", **plan),
        device=device,
    )


def cases(device: str = "cpu") -> dict[str, LlamaCase]:
    """Every configuration by name."""
    half: dict[str, Any] = {"dtype": "bfloat16"}
    small: dict[str, Any] = {"quantization": "nf4", **half}
    eight: dict[str, Any] = {"quantization": "8bit", **half}
    slow: dict[str, Any] = {"gradient_checkpointing": True}
    moments: dict[str, Any] = {"optim": "adamw_8bit"}
    eager: dict[str, Any] = {"attention": "eager"}
    plans: list[tuple[str, dict[str, Any]]] = [
        ("20M", {"rank": 4, "batch": 8, "max_length": 256}),
        ("60M", {"rank": 16, "batch": 4, "max_length": 256}),
        ("60M", {"rank": 64, "batch": 8, "max_length": 256, **slow}),
        ("300M", {"rank": 64, "batch": 2, "max_length": 256, **slow}),
        ("20M", {"rank": 16, "batch": 8, "max_length": 256, **half}),
        ("150M", {"rank": 32, "batch": 2, "max_length": 256, **half}),
        ("300M", {"rank": 64, "carried_rank": 128, "max_length": 256, **half, **slow}),
        ("60M", {"rank": 8, "batch": 4, "max_length": 256, **small}),
        ("150M", {"rank": 64, "batch": 4, "max_length": 256, **small, **slow}),
        ("300M", {"rank": 16, "max_length": 256, "quantization": "nf4"}),
        ("60M", {"rank": 8, "batch": 4, "max_length": 256, **eight}),
        ("60M", {"rank": 8, "batch": 8, "max_length": 256, "quantization": "8bit", **slow}),
        ("300M", {"rank": 64, "batch": 2, "max_length": 256, **half, **slow, **moments}),
        ("300M", {"rank": 256, "max_length": 256, **small, **slow, **moments}),
        ("60M", {"rank": 16, "batch": 2, "max_length": 512, **eager}),
        ("60M", {"rank": 8, "batch": 4, "max_length": 512, **half, **eager}),
        ("150M", {"rank": 16, "batch": 2, "max_length": 1024, **small, **slow, **eager}),
        ("60M", {"rank": 16, "carried_rank": 32, "batch": 4, "max_length": 256, "aligned": True}),
        (
            "150M",
            {
                "rank": 32,
                "carried_rank": 64,
                "carried_dtype": "bfloat16",
                "batch": 4,
                "max_length": 256,
                "aligned": True,
                **half,
                **slow,
            },
        ),
        (
            "300M",
            {
                "rank": 8,
                "carried_rank": 32,
                "batch": 2,
                "max_length": 256,
                "aligned": True,
                **small,
                **slow,
            },
        ),
    ]
    if device == "cuda":
        plans += [
            ("300M", {"rank": 16, "batch": 4, "max_length": 256, **eight}),
            ("1B", {"rank": 16, "batch": 2, "max_length": 512, **eight, **slow}),
            ("7B", {"rank": 16, "max_length": 512, **eight, **slow}),
            ("1B", {"rank": 16, "batch": 4, "max_length": 512, **half}),
            ("1B", {"rank": 64, "batch": 4, "max_length": 512, **small, **slow}),
            ("7B", {"rank": 64, "max_length": 512, **small, **slow}),
            ("7B", {"rank": 16, "max_length": 512, **half, **slow}),
            ("7B", {"rank": 64, "max_length": 512, **small, **slow, **moments}),
            ("7B", {"rank": 64, "max_length": 512, **small, **slow, "optim": "paged_adamw_8bit"}),
            ("1B", {"rank": 16, "batch": 2, "max_length": 1024, **half, **eager}),
        ]
    return {_name(size, plan): _case(size, device, **plan) for size, plan in plans}


def _name(size: str, plan: dict[str, Any]) -> str:
    held = plan.get("quantization", "") or plan.get("dtype", "float32")
    if plan.get("quantization") and plan.get("dtype", "float32") == "float32":
        held += " float32"
    parts = [size, held, f"rank {plan['rank']}"]
    if "carried_rank" in plan:
        parts.append(f"carried {plan['carried_rank']}")
    parts += ["aligned"] if plan.get("aligned") else []
    parts += [plan[key] for key in ("optim", "attention") if key in plan]
    parts += ["checkpointing"] if plan.get("gradient_checkpointing") else []
    return " ".join([*parts, f"{plan.get('batch', 1)}x{plan['max_length']}"])


def predicted(case: LlamaCase) -> MemoryTerms:
    return training_memory(shape_from_config(case.config().to_dict()), case.plan)


def measured(case: LlamaCase, threads: int) -> dict[str, int]:
    """Bytes measured in a process of its own."""
    name = "flexlora.simulations.benchmarks.memory_case"
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", name, case.to_json()],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_row(name: str, case: LlamaCase, threads: int) -> MemoryRow:
    """Prediction and measurement of one case.

    Raises:
        RuntimeError: an increment too small to be told from the interpreter's own.
    """
    terms, bytes_measured = predicted(case), measured(case, threads)
    if bytes_measured["training"] < SMALLEST:
        raise RuntimeError(
            f"{name}: the peak grew by {bytes_measured['training'] / 1e6:.0f} MB, expected at "
            f"least {SMALLEST / 1e6:.0f}; take more rows or a larger model."
        )
    return MemoryRow(
        name=name,
        predicted=terms.total,
        measured=bytes_measured["training"],
        baseline=bytes_measured["baseline"],
        moment=terms.moment,
        target=ALLOWED[case.device],
    )


def main(arguments: Sequence[str] | None = None) -> list[MemoryRow]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--smoke", action="store_true", help="the first case alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name holds a word")
    options = parser.parse_args(arguments)
    chosen = cases("cuda" if torch.cuda.is_available() else "cpu")
    if options.only:
        chosen = {n: c for n, c in chosen.items() if any(word in n for word in options.only)}
    if options.smoke:
        chosen = dict(list(chosen.items())[:1])
    rows = []
    for name, case in chosen.items():
        print(f"measuring {name}", file=sys.stderr, flush=True)
        rows.append(measure_row(name, case, options.threads))
    _print(rows)
    if options.json:
        keys = ("ratio", "error", "met")
        written = [{**asdict(row), **{key: getattr(row, key) for key in keys}} for row in rows]
        Path(options.json).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return rows


def _print(rows: Sequence[MemoryRow]) -> None:
    table = Table(title="memory of local training", caption=f"torch {torch.__version__}")
    for column in ("what", "predicted MB", "measured MB", "ratio", "moment", "baseline MB", "met"):
        table.add_column(column, justify="left" if column in ("what", "moment") else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.predicted / 1e6:.0f}",
            f"{row.measured / 1e6:.0f}",
            f"{row.ratio:.3f}",
            row.moment,
            f"{row.baseline / 1e6:.0f}",
            "yes" if row.met else "no",
        )
    make_console().print(table)


if __name__ == "__main__":
    main()
