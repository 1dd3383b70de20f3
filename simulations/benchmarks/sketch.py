"""The gradient sketch against the exact gradient: what it captures, how far off, at what cost.

    python -m flexlora.simulations.benchmarks.sketch [--model DIR] [--data DIR]
        [--quantization none|nf4] [--clients 4] [--batches 1,4] [--json FILE]

The sketch is the product's own (``SlotModel.sketching`` over a cohort of clients times ranks); the
exact gradient is float64 autograd on ``W``, for NF4 on the dequantized ``W``. With ``V_r`` the
exact gradient's top right singular vectors and ``Q`` an orthonormal basis of the r rows found:

    ratio = |G Q|^2 / |G V_r|^2        cosines = singular values of Q^T V_r

A ratio of 1 is the best that any r rows can do. Cosines say less where singular values are nearly
equal: any basis of a nearly flat spectrum is as good as another. ``error`` is the sketch's distance
from ``Psi G`` in float64. Other sketches and the memory: ``sketch_choices.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from flexlora.algebra.linalg import live_rows
from flexlora.algebra.sketch import GradientSketch
from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config
from flexlora.data.collation import Batch, Example, batch_plan, collate
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.report.console import make_console
from flexlora.seeds import generator
from flexlora.simulations.benchmarks.sketch_choices import (
    BATCHES,
    best_rows,
    captured,
    choice_rows,
    memory_rows,
)
from flexlora.training.local import answer_losses
from flexlora.training.models import load_base
from flexlora.training.slots import SlotModel
from flexlora.units import human_bytes

__all__ = ["Capture", "cohort_captures", "exact_gradients", "main", "oracle_of"]

RANKS = (2, 4, 8, 16)
TARGET = 0.9  # of the energy that the best rows of that rank capture
Gradients = dict[str, Tensor]  # float64 [out, in] by module


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What r rows found by the sketch hold of one module's exact gradient, for one client."""

    name: str
    client_id: str
    batches: int
    rank: int
    sketch_rows: int
    ratio: float  # the sketch's energy over the best possible
    random: float  # the same for random rows
    cosine_mean: float
    cosine_worst: float
    error: float  # |sketch - Psi G| / |Psi G|, float64 Psi G


def cosines(rows: Tensor, best: Tensor) -> Tensor:
    """Cosines of the principal angles between two row spaces, nonincreasing."""
    return torch.linalg.svdvals(best @ torch.linalg.qr(rows.double().T).Q)


def oracle_of(worker: Worker) -> SlotModel:
    """The worker's base in float64, with the weights that its linears really multiply by."""
    name = worker.config.model.name
    exact = SlotModel(load_base(name, dtype="float64", device="cpu", fresh=True).model)
    for module, layer in worker.slots.layers.items():
        held: Any = layer.base
        if type(held).__name__ == "Linear4bit":
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(held.weight.data, held.weight.quant_state)
            exact.layers[module].base.get_parameter("weight").data.copy_(weight)
    return exact


def exact_gradients(oracle: SlotModel, batches: Iterable[Batch]) -> Gradients:
    """``dL/dW`` of every target by autograd, L the sum over batches of the mean answer loss."""
    weights = {name: layer.base.get_parameter("weight") for name, layer in oracle.layers.items()}
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        loss = torch.stack([part.mean() for part in answer_losses(oracle, batch)]).sum()
        for total, part in zip(
            totals.values(), torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            total += part
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: G.T if oracle.fan_in_fan_out else G for name, G in totals.items()}


def client_batches(worker: Worker, client_id: str, count: int) -> list[list[Example]]:
    """The rows of a client's first batches in round 1, as training plans them."""
    rows = worker.data.examples(client_id, "train")
    plan = batch_plan(
        len(rows),
        batch_size=worker.settings.per_device_train_batch_size,
        steps=count,
        seed_parts=(worker.settings.seed, "batches", 1, client_id),
    )
    return [[rows[i] for i in indices] for indices in plan]


def cohort_captures(
    worker: Worker, oracle: SlotModel, clients: Sequence[str], batches: int, seed: int
) -> list[Capture]:
    """Every client at every rank as one cohort's slots, each measured against its own gradient."""
    members = [(client, rank) for client in clients for rank in RANKS]
    planned = {client: client_batches(worker, client, batches) for client in clients}
    slots, pad = worker.slots, worker.base.pad_token_id
    starts = [start_at(slots.shapes, rank, seed) for _, rank in members]
    slots.load(starts, trainable=("lora_A", "lora_B"))
    with slots.sketching(seed):
        for step in range(batches):
            batch = collate([planned[client][step] for client, _ in members], pad_token_id=pad)
            losses = [part.mean() for part in answer_losses(slots, batch)]
            slots.accumulate_gradients(torch.stack(losses).sum())
        sketches = {name: layer.observer for name, layer in slots.layers.items()}
    found = [slots.extract(slot) for slot in range(len(members))]
    slots.clear()
    captures = []
    for client in clients:
        alone = [collate([rows], pad_token_id=pad) for rows in planned[client]]
        for name, gradient in exact_gradients(oracle, alone).items():
            best, sketch = best_rows(gradient, max(RANKS)), sketches[name]
            assert isinstance(sketch, GradientSketch)
            for slot, (member, rank) in enumerate(members):
                if member == client:
                    lora_A = found[slot][name].lora_A
                    captures.append(
                        Capture(
                            name=name,
                            client_id=client,
                            batches=batches,
                            rank=rank,
                            sketch_rows=sketch.sizes[slot],
                            error=sketch_error(sketch, slot, gradient),
                            **measure(gradient, lora_A, best[:rank], seed),
                        )
                    )
    return captures


def start_at(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> Adapter:
    """Random rows and ``lora_B = 0``: the gradient is that of the base."""
    return Adapter(
        {
            name: LoRAFactors(
                lora_A=live_rows(min(rank, *s), s[1], generator(seed, "start", name)).float(),
                lora_B=torch.zeros(s[0], min(rank, *s)),
                alpha=16.0,
            )
            for name, s in shapes.items()
        }
    )


def measure(gradient: Tensor, rows: Tensor, best: Tensor, seed: int) -> dict[str, float]:
    """Ratio and cosines of ``rows``, and the ratio of as many random rows."""
    control = live_rows(rows.shape[0], rows.shape[1], generator(seed, "control"))
    most, angles = captured(gradient, best), cosines(rows, best)
    return {
        "ratio": captured(gradient, rows) / most,
        "random": captured(gradient, control) / most,
        "cosine_mean": float(angles.mean()),
        "cosine_worst": float(angles.min()),
    }


def sketch_error(sketch: GradientSketch, slot: int, gradient: Tensor) -> float:
    """``|sketch - Psi G| / |Psi G|`` of one slot."""
    size = sketch.sizes[slot]
    assert sketch.total is not None
    exact = sketch.Psi[:size] @ gradient
    return float((sketch.total[slot, :size].double() - exact).norm() / exact.norm())


def summary_rows(captures: Sequence[Capture], label: str) -> list[dict[str, object]]:
    """Means and worst cases by batches and rank: over all modules, then by kind of module."""
    kinds = ["all", *dict.fromkeys(c.name.rpartition(".")[2] for c in captures)]
    cells = [
        (kind, batches, rank)
        for kind in kinds
        for batches, rank in dict.fromkeys((c.batches, c.rank) for c in captures)
    ]
    rows: list[dict[str, object]] = []
    for kind, batches, rank in cells:
        alike = [c for c in captures if (c.batches, c.rank) == (batches, rank)]
        group = [c for c in alike if kind in ("all", c.name.rpartition(".")[2])]
        rows.append(
            {
                "name": f"{label}, batches {batches}, rank {rank}, {kind}",
                "ratio": mean(c.ratio for c in group),
                "target": TARGET,
                "error": max(c.error for c in group),
                "worst": min(c.ratio for c in group),
                "random": mean(c.random for c in group),
                "cosine": mean(c.cosine_mean for c in group),
                "worst_cosine": min(c.cosine_worst for c in group),
                "sketch_rows": max(c.sketch_rows for c in group),
            }
        )
    return rows


def batch_gradients(worker: Worker, oracle: SlotModel, client_id: str) -> list[Gradients]:
    """The exact gradient of every whole batch of a client's first epoch."""
    size = worker.settings.per_device_train_batch_size
    count = len(worker.data.examples(client_id, "train")) // size
    pad = worker.base.pad_token_id
    planned = client_batches(worker, client_id, count)
    return [exact_gradients(oracle, [collate([rows], pad_token_id=pad)]) for rows in planned]


def pick_clients(worker: Worker, count: int, batches: int) -> list[str]:
    """``count`` clients, spread over those with rows for that many whole batches.

    Raises:
        UserError: there are fewer.
    """
    needed = batches * worker.settings.per_device_train_batch_size
    able = [c for c in worker.client_ids if len(worker.data.examples(c, "train")) >= needed]
    if count < 1 or len(able) < count:
        raise UserError(
            f"--clients is {count}, expected 1 to {len(able)}: that many hold the {needed} rows "
            f"of {batches} batches. Ask for fewer clients or batches."
        )
    return able[:: len(able) // count][:count]


def print_table(rows: Sequence[dict], columns: Sequence[str]) -> None:
    """One line a row; bytes in units, errors as powers of ten."""
    table = Table(box=None, pad_edge=False)
    table.add_column("name")
    for column in columns:
        table.add_column(column.removesuffix("_bytes").replace("_", " "), justify="right")
    for row in rows:
        table.add_row(row["name"], *(_cell(column, row[column]) for column in columns))
    make_console().print(table, "")


def _cell(column: str, value: float) -> str:
    if column.endswith("_bytes"):
        return human_bytes(value)
    if column == "error":
        return f"{value:.0e}"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def run(options: argparse.Namespace) -> list[dict]:
    """All rows, printed as they come."""
    values = {
        "seed": options.seed,
        "model.name": options.model,
        "model.quantization": options.quantization,
        "data.path": options.data,
        "engine.device": "cpu",
    }
    worker = Worker(Config.of(values))
    clients = pick_clients(worker, options.clients, max(*options.batches, BATCHES + 1))
    oracle, base = oracle_of(worker), {"none": "float32", "nf4": "nf4"}[options.quantization]
    captures: list[Capture] = []
    for count in options.batches:
        captures += cohort_captures(worker, oracle, clients, count, options.seed)
    first = [c for c in captures if c.client_id == clients[0]]
    one = summary_rows(first, f"{base}, clients 1")
    several = summary_rows(captures, f"{base}, clients {len(clients)}")
    columns = ("ratio", "worst", "random", "cosine", "worst_cosine", "sketch_rows", "error")
    overall = [row for row in one + several if str(row["name"]).endswith(", all")]
    print_table(overall, columns)
    print_table([row for row in several if row not in overall], columns)
    gradients = [batch_gradients(worker, oracle, client) for client in clients[:2]]
    choices = choice_rows(gradients, RANKS, base)
    print_table(choices, ("ratio", "target", "own", "worst_own", "passes"))
    memory = memory_rows()
    print_table(memory, ("ratio", *(key for key in memory[0] if key.endswith("_bytes")), "error"))
    return [*one, *several, *choices, *memory]


def whole_numbers(text: str) -> list[int]:
    """``1,4`` as numbers, for argparse."""
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables and write their rows with ``--json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded", help="model folder, or embedded")
    parser.add_argument("--data", default="", help="data folder (default: the built-in tasks)")
    parser.add_argument("--quantization", default="none", choices=("none", "nf4"))
    parser.add_argument("--clients", type=int, default=4, help="clients in the cohort")
    parser.add_argument("--batches", type=whole_numbers, default=[1, 4], help="behind a gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    try:
        rows = run(options)
    except UserError as error:
        parser.error(str(error))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
