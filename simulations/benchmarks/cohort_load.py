"""What a cohort costs beside its passes: CPU seconds of one core, step by step.

    python -m flexlora.simulations.benchmarks.cohort_load [--slots 16] [--layers 30] [--json FILE]

A random Llama in the shape of SmolLM2-135M (210 target modules) and a cohort of clients at ranks 4,
8 and 16, each with separately decoded adapters:

    decode         the clients' train messages, of three rank classes, digests among it
    drawn terms    the start of every client of a method that draws the terms to train
    load           as ``carried`` (three carried adapters of rank up to 32), and as ``aligned`` (the
                   same one of rank 32, decoded by every client)
    dropout masks  of one pass, a row of 16 tokens a client
    align          ``lora_A`` from the gradients' sketches
    8-bit step     one optimizer step; also at ranks 3, 5 and 7, whose factors end inside a block
    extract        the trained factors of every client
    evaluation     digests of the adapters of 32 clients' evaluation jobs, as grouped for passes
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict
from rich.table import Table

from flexlora.aggregation.engine.starts import LocalPlan, Start
from flexlora.algebra.sketch import GradientSketch
from flexlora.clients.messages import Memo, decode_train_job
from flexlora.evaluation.cohorts import EvalPlan
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.ranks import RankClass
from flexlora.report.console import make_console
from flexlora.seeds import generator
from flexlora.server.transport.messages import encode_train_job, pack
from flexlora.training.layers import DropoutStream
from flexlora.training.optim import SlotOptimizer
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import EvalJob

__all__ = ["CohortLoad", "main", "random_llama"]

RANKS = (4, 8, 16)
CARRIED = 32
BOTH = ("lora_A", "lora_B")


def random_llama(layers: int) -> Any:
    """A random model in the shape of SmolLM2-135M (30 layers), its vocabulary aside."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False).eval()


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


class CohortLoad:
    """A cohort of ``slots`` clients on a model; ``steps`` times every step once."""

    def __init__(self, model: Any, slots: int) -> None:
        self.slots = SlotModel(model)
        self.ranks = [RANKS[k % len(RANKS)] for k in range(slots)]

    def adapter(self, rank: int, seed: int) -> Adapter:
        draw = generator(seed, "cohort_load")
        return Adapter(
            {
                name: LoRAFactors(
                    lora_A=torch.randn(rank, features, generator=draw) / features**0.5,
                    lora_B=torch.randn(out, rank, generator=draw) / 10,
                    alpha=16.0,
                )
                for name, (out, features) in self.slots.shapes.items()
            }
        )

    def steps(self) -> dict[str, float]:
        by_rank = {rank: self.adapter(rank, rank) for rank in RANKS}
        rest = {rank: self.adapter(CARRIED - rank, rank + 1) for rank in RANKS}
        whole = self.adapter(CARRIED, 0)
        seconds = {"decode": self._decode(by_rank, rest), "drawn terms": self._draw(whole)}
        trained = [_copy(by_rank[rank]) for rank in self.ranks]
        carried = [_copy(rest[rank]) for rank in self.ranks]
        same = [_copy(whole) for _ in self.ranks]
        seconds["load, carried"] = self._load(trained, carried)
        seconds["load, aligned"] = self._load(trained, same)
        seconds["dropout masks"] = self._masks()
        seconds["align"] = self._align()
        seconds["8-bit step"] = self._step()
        count = len(self.ranks)
        seconds["extract"] = cpu_seconds(lambda: [self.slots.extract(k) for k in range(count)])
        odd = {rank: self.adapter(rank - 1, rank) for rank in RANKS}
        self._load([odd[rank] for rank in self.ranks], [None] * count)
        seconds["8-bit step, odd ranks"] = self._step()
        seconds["evaluation"] = self._evaluation(by_rank)
        self.slots.clear()
        return seconds

    def _decode(self, trained: dict[int, Adapter], carried: dict[int, Adapter]) -> float:
        contents = {rank: _message(rank, trained[rank], carried[rank]) for rank in RANKS}
        memo: Memo = {}

        def decode() -> None:
            for k, rank in enumerate(self.ranks):
                decode_train_job(contents[rank], f"client_{k}", memo)

        return cpu_seconds(decode)

    def _draw(self, whole: Adapter) -> float:
        local = LocalPlan(select=True)
        start = Start(rank_class=RankClass.of(8), base_round=0, trained=whole, local=local)
        count = len(self.ranks)
        return cpu_seconds(lambda: [start.for_client(f"client_{k}") for k in range(count)])

    def _load(self, trained: Sequence[Adapter], carried: Sequence[Adapter | None]) -> float:
        self.slots.clear()
        return cpu_seconds(lambda: self.slots.load(trained, carried=carried, trainable=BOTH))

    def _masks(self) -> float:
        streams = [
            DropoutStream(seed=k, rows=1, length=16, padded_length=16)
            for k in range(len(self.ranks))
        ]
        self.slots.set_dropout(0.1, streams)
        layers = self.slots.layers.values()
        inputs = {
            width: torch.ones(len(streams), 16, width)
            for width in {layer.in_features for layer in layers}
        }
        seconds = cpu_seconds(lambda: [layer._mask(inputs[layer.in_features]) for layer in layers])
        self.slots.set_dropout(0.0, ())
        return seconds

    def _align(self) -> float:
        sketching = self.slots.sketching(seed=1)
        sketching.__enter__()
        for layer in self.slots.layers.values():
            sketch = layer.observer
            assert isinstance(sketch, GradientSketch)
            size, draw = len(sketch.frequencies), generator(2, layer.name)
            shape = (len(self.ranks), size, layer.in_features)
            sketch.total = torch.randn(shape, generator=draw)
        return cpu_seconds(lambda: sketching.__exit__(None, None, None))

    def _step(self) -> float:
        slots = self.slots
        optimizer = SlotOptimizer(slots.parameters, optim="adamw_8bit", live=slots.live_numbers)
        gradients = torch.where(slots.parameters == 0, 0.0, 0.01)
        rates = [1e-3] * len(self.ranks)
        optimizer.step(gradients, rates)  # the first imports kernels
        return cpu_seconds(lambda: optimizer.step(gradients, rates))

    def _evaluation(self, adapters: dict[int, Adapter]) -> float:
        named = {f"rank_{rank}": adapter for rank, adapter in adapters.items()}
        jobs = [EvalJob(client_id=f"client_{k}", server_round=1, adapters=named) for k in range(32)]
        plan = EvalPlan(jobs=jobs, examples=[[None]] * len(jobs))  # type: ignore[list-item]
        return cpu_seconds(plan.groups)


def _copy(adapter: Adapter) -> Adapter:
    return adapter.map(torch.clone)


def _message(rank: int, trained: Adapter, carried: Adapter) -> RecordDict:
    """A train message of a rank class, as the server sends it."""
    start = Start(rank_class=RankClass.of(rank), base_round=0, trained=trained, carried=carried)
    payloads = {"trained": pack(trained, "float32"), "carried": pack(carried, "float32")}
    return encode_train_job(start, payloads, server_round=1, num_server_rounds=1)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30, help="7 target modules each")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load = CohortLoad(random_llama(options.layers), options.slots)
    seconds = load.steps()
    table = Table(
        title=f"{options.slots} clients on {len(load.slots.shapes)} modules",
        caption=f"CPU seconds of one core, torch {torch.__version__}",
    )
    table.add_column("step")
    table.add_column("CPU s", justify="right")
    for step, value in seconds.items():
        table.add_row(step, f"{value:.2f}")
    make_console().print(table)
    if options.json:
        options.json.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
    return seconds


if __name__ == "__main__":
    main()
