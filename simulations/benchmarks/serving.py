"""Serving many adapters: the engine beside PEFT's two ways, on the same requests in one run.

    python -m flexlora.simulations.benchmarks.serving [--model embedded] [--adapters 32]
        [--ranks 2,4,8,16,32,64] [--clients 64] [--requests 192] [--tokens 8-64]
        [--prompt 8-48] [--repeats 3] [--json FILE]

``--clients`` requests are in flight. Requests are dealt to the adapters in turn; prompts and
answers have random lengths in the ranges given. Greedy tokens of all ways are compared. Seconds are
of the CPU, on one thread, so that another program on the machine does not count; of ``--repeats``
turns of all ways, one after the other, the table has the best of each. ``first token`` is from the
request to its first token, median and 95th percentile.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.report.console import make_console
from flexlora.serving.limits import Limits
from flexlora.simulations.benchmarks.serving_ways import Ask, Engined, Peft, Run
from flexlora.training.models import load_base
from flexlora.training.targets import find_targets

__all__ = ["compare", "main"]

WAYS = ("PEFT, switching", "PEFT, mixed batch", "engine")


def random_adapter(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> Adapter:
    """Strong enough that every adapter answers otherwise."""
    generator = torch.Generator().manual_seed(seed)

    def factors(out_features: int, in_features: int) -> LoRAFactors:
        A = torch.randn(rank, in_features, generator=generator) * in_features**-0.5
        B = torch.randn(out_features, rank, generator=generator) * 0.3 * rank**-0.5
        return LoRAFactors(lora_A=A, lora_B=B, alpha=float(rank))

    return Adapter({name: factors(*shape) for name, shape in shapes.items()})


def asks_of(options: argparse.Namespace, names: Sequence[str], vocab: int) -> list[Ask]:
    """The requests, adapters in turn."""
    draw = random.Random(options.seed)
    return [
        Ask(
            adapter=names[i % len(names)],
            prompt=[draw.randrange(10, vocab) for _ in range(draw.randint(*options.prompt))],
            tokens=draw.randint(*options.tokens),
        )
        for i in range(options.requests)
    ]


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way, with its ratio to the engine."""
    base = load_base(options.model, device="cpu")
    shapes = find_targets(base.model, "all-linear")
    adapters = {
        f"adapter-{k}": random_adapter(shapes, options.ranks[k % len(options.ranks)], k)
        for k in range(options.adapters)
    }
    asks = asks_of(options, list(adapters), base.vocab_size)
    peft = Peft(options.model, adapters)
    engined = Engined(options.model, adapters, Limits(max_running=options.clients))
    ways: dict[str, Callable[..., Run]] = dict(
        zip(WAYS, (peft.switching, peft.mixed, engined.run), strict=True)
    )
    for way in ways.values():  # every adapter is used once before
        way([Ask(adapter=name, prompt=[5], tokens=1) for name in adapters], 8, time.process_time)
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            runs[name].append(way(asks, options.clients, time.process_time))
    best = {name: min(of_way, key=lambda run: run.seconds) for name, of_way in runs.items()}
    return [_row(name, best[name], best["engine"]) for name in ways]


def _row(name: str, run: Run, engine: Run) -> dict[str, Any]:
    cuts = statistics.quantiles(run.waits, n=20)
    tokens = sum(map(len, run.answers))
    same = sum(a == b for a, b in zip(run.answers, engine.answers, strict=True))
    return {
        "way": name,
        "requests": len(run.answers),
        "seconds": run.seconds,
        "requests_per_second": len(run.answers) / run.seconds,
        "tokens_per_second": tokens / run.seconds,
        "first_token_median": cuts[9],
        "first_token_p95": cuts[18],
        "ratio": run.seconds / engine.seconds,
        "same_answers": same,
    }


def _span(text: str) -> tuple[int, int]:
    """``8-48``, or one number for both ends."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def _numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument(
        "--ranks",
        type=lambda text: [int(r) for r in text.split(",")],
        default=[2, 4, 8, 16, 32, 64],
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--tokens", type=_span, default=(8, 64))
    parser.add_argument("--prompt", type=_span, default=(8, 48))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    found = compare(options)
    title = f"{options.adapters} adapters on {options.model}, {options.clients} requests in flight"
    table = Table(title=title, title_justify="left")
    columns = ("", "requests/s", "tokens/s", "first token", "95 %", "engine is", "same answers")
    for name in columns:
        table.add_column(name, justify="left" if not name else "right")
    for row in found:
        table.add_row(
            row["way"],
            f"{row['requests_per_second']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            *(f"{1000 * row[f'first_token_{part}']:.0f} ms" for part in ("median", "p95")),
            f"{row['ratio']:.2f} x",
            f"{row['same_answers']} of {row['requests']}",
        )
    make_console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
