"""A step of DP-SGD beside a plain one: seconds and memory on one base.

    python -m flexlora.simulations.benchmarks.row_privacy [--model DIR] [--rank 8] [--batch 8]
        [--steps 20] [--slots 1,8] [--repeats 3] [--json FILE]

A local training of ``--steps`` by ``--slots`` clients at once, plain and with clipped rows and
noise. Plain steps have ``--batch`` rows; private ones draw that many in the mean, in as many passes
as it takes. ``pass`` is one pass over the same rows either way, forward and backward: what the
gradient of each row costs by itself. Seconds are of the CPU, the best of ``--repeats``; memory is
what one pass adds at its highest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from flexlora.aggregation import make_method
from flexlora.aggregation.engine.starts import Factoring
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config
from flexlora.data.collation import collate
from flexlora.lora.ranks import RankClass
from flexlora.report.console import make_console
from flexlora.simulations.benchmarks.sketch_choices import peak_bytes
from flexlora.training.local import TrainSettings, answer_losses, row_losses, train
from flexlora.units import human_bytes
from flexlora.wire.jobs import TrainJob

__all__ = ["compare", "main"]

TARGET = 2.0  # a private step over a plain one


def compare(
    worker: Worker, *, slots: int, rank: int, steps: int, repeats: int
) -> list[dict[str, Any]]:
    """The rows of the table for so many clients in a pass."""
    jobs = [_job(worker, client_id, rank) for client_id in worker.client_ids[:slots]]
    rows = [worker.train_rows(job) for job in jobs]
    plain = worker.settings.model_copy(update={"max_steps": steps})
    private = plain.model_copy(update={"row_clip": 1.0, "row_noise": 1.0})

    def training(settings: TrainSettings) -> Callable[[], object]:
        pad = worker.base.pad_token_id
        return lambda: train(worker.slots, jobs, rows, settings, pad_token_id=pad)

    found = [_row("step", slots, training(plain), training(private), repeats, per=steps)]
    batch = plain.per_device_train_batch_size
    first = collate([part[:batch] for part in rows], pad_token_id=worker.base.pad_token_id)
    start, model = jobs[0].start, worker.slots
    model.load([job.start.trained for job in jobs], trainable=start.trainable)

    def plain_pass() -> None:
        means = [part.mean() for part in answer_losses(model, first)]
        model.accumulate_gradients(torch.stack(means).sum())

    def private_pass() -> None:
        with model.recording_rows(len(first.input_ids)) as recorded:
            recorded.backward(row_losses(model, first))
        model.gradients += recorded.clipped_sum(1.0, slots)

    found.append(_row("pass", slots, plain_pass, private_pass, repeats))
    memory = [peak_bytes(plain_pass), peak_bytes(private_pass)]
    found[-1] |= {"plain_bytes": memory[0], "private_bytes": memory[1]}
    model.clear()
    return found


def _job(worker: Worker, client_id: str, rank: int) -> TrainJob:
    state = State(round=0, change=GlobalChange.zero(worker.slots.shapes))
    rank_class = RankClass(name=f"rank_{rank}", rank=rank)
    start = make_method("carried").start(state, rank_class, Factoring(alpha=16.0)).sealed()
    return TrainJob(client_id=client_id, server_round=1, num_server_rounds=8, start=start)


def _row(
    name: str,
    slots: int,
    plain: Callable[[], object],
    private: Callable[[], object],
    repeats: int,
    *,
    per: int = 1,
) -> dict[str, Any]:
    """The best of ``repeats`` turns of each, in CPU seconds."""
    best = [float("inf")] * 2
    for _ in range(repeats):
        for k, work in enumerate((plain, private)):
            began = time.process_time()
            work()
            best[k] = min(best[k], (time.process_time() - began) / per)
    return {
        "name": f"{name}, {slots} clients" if slots > 1 else f"{name}, 1 client",
        "plain_seconds": best[0],
        "private_seconds": best[1],
        "ratio": best[1] / best[0],
        "target": TARGET,
        "error": 0.0,
    }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--slots", default="1,8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    values = {
        "model.name": options.model,
        "train.per-device-train-batch-size": options.batch,
        "engine.threads": 1,
    }
    worker = Worker(Config.of(values))
    found = []
    for slots in map(int, options.slots.split(",")):
        found += compare(
            worker, slots=slots, rank=options.rank, steps=options.steps, repeats=options.repeats
        )
    table = Table(title="DP-SGD beside plain steps", title_justify="left")
    for name in ("", "plain", "private", "private / plain", "memory: plain", "private"):
        table.add_column(name, justify="left" if not name else "right")
    for row in found:
        sizes = [human_bytes(row[key]) if key in row else "" for key in MEMORY]
        seconds = [f"{1000 * row[key]:.1f} ms" for key in ("plain_seconds", "private_seconds")]
        table.add_row(row["name"], *seconds, f"{row['ratio']:.2f}", *sizes)
    make_console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


MEMORY = ("plain_bytes", "private_bytes")

if __name__ == "__main__":
    main()
