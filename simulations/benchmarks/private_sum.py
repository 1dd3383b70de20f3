"""What clipping and noise add to a round of the embedded default: training and the server's part.

    python -m flexlora.simulations.benchmarks.private_sum [--json FILE] [--repeats N] [--steps N]

One client of each rank class is trained, and counts as two of the eight clients of a round. The
second round is then closed without privacy, with clipping alone, and with clipping and noise, in
turn, at server rate 1. A ratio is (training + server with it) over (training + server without), in
CPU seconds of one thread, the median over the repeats: other work on the machine does not count.
``server`` is the ratio of the server's part alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from flexlora.aggregation import make_method, method_class
from flexlora.aggregation.engine.gaussian_sum import GaussianSum
from flexlora.aggregation.engine.method import Method
from flexlora.aggregation.engine.norm_bound import norms_of
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.starts import Start
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update
from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config
from flexlora.lora.ranks import RankClass
from flexlora.report.console import make_console
from flexlora.server.settings import factoring_of
from flexlora.wire.jobs import TrainJob, TrainResult

__all__ = ["PrivateSumRow", "main"]

RANKS = (2, 4, 8, 16)
COPIES = 2
WAYS: dict[str, GaussianSum | None] = {
    "plain": None,
    "clip": GaussianSum(clip=1.0, noise_multiplier=0.0, expected_clients=8.0, seed=0),
    "clip and noise": GaussianSum(clip=1.0, noise_multiplier=1.0, expected_clients=8.0, seed=0),
}


@dataclass(frozen=True, kw_only=True)
class PrivateSumRow:
    """``ratio`` is that of the round, to be at most ``target``; seconds are of the CPU."""

    name: str
    ratio: float
    target: float
    server_ratio: float
    server_seconds: float
    train_seconds: float
    error: float = 0.0


def main(arguments: Sequence[str] | None = None) -> list[PrivateSumRow]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of each client's training")
    parser.add_argument("--methods", nargs="+", default=["carried", "basis", "ffa-lora"])
    options = parser.parse_args(arguments)
    rows = [
        row for method in options.methods for row in _rows(method, options.steps, options.repeats)
    ]
    table = Table(box=None, pad_edge=False)
    for heading in ("", "round", "server", "server seconds", "training seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        ratios = f"{row.ratio:.3f}", f"{row.server_ratio:.2f}"
        table.add_row(row.name, *ratios, f"{row.server_seconds:.3f}", f"{row.train_seconds:.2f}")
    make_console().print(table)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return rows


def _rows(name: str, steps: int, repeats: int) -> list[PrivateSumRow]:
    config = Config.of({"engine.threads": 1, "train.max-steps": steps})
    options = {"server_learning_rate": 1.0}
    known = method_class(name).Options.model_fields
    method = make_method(name, **{key: options[key] for key in options if key in known})
    worker = Worker(config)
    state = State(round=0, change=GlobalChange.zero(worker.shapes))
    starts = _starts(method, state, config)
    state, _ = _closed(method, state, starts, _train(worker, starts), None)
    starts = _starts(method, state, config)
    began = time.process_time()
    trained = _train(worker, starts)
    training = COPIES * (time.process_time() - began)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, private in WAYS.items():
            seconds[way].append(_closed(method, state, starts, trained, private)[1])
    middle = {way: statistics.median(found) for way, found in seconds.items()}
    plain, targets = middle.pop("plain"), {"clip": 1.05, "clip and noise": 1.2}
    return [
        PrivateSumRow(
            name=f"{name}, {way}",
            ratio=(training + server) / (training + plain),
            target=targets[way],
            server_ratio=server / plain,
            server_seconds=server,
            train_seconds=training,
        )
        for way, server in middle.items()
    ]


def _starts(method: Method, state: State, config: Config) -> dict[str, Start]:
    classes = (RankClass(name=f"rank_{rank}", rank=rank) for rank in RANKS)
    factoring = factoring_of(config)
    return {one.name: method.start(state, one, factoring).sealed() for one in classes}


def _train(worker: Worker, starts: dict[str, Start]) -> list[TrainResult]:
    """One client of each class, in one pass."""
    return worker.train(
        [
            TrainJob(client_id=client_id, server_round=1, num_server_rounds=1, start=start)
            for client_id, start in zip(worker.client_ids, starts.values(), strict=False)
        ]
    )


def _closed(
    method: Method,
    state: State,
    starts: dict[str, Start],
    trained: Sequence[TrainResult],
    private: GaussianSum | None,
) -> tuple[State, float]:
    """The next state, and the CPU seconds of norms, sums and the server's step."""
    began = time.process_time()
    opened = OpenRound(method, state, starts, private=private)
    for copy in range(COPIES):
        for result in trained:
            if result.adapter is None:
                raise RuntimeError(f"client {result.client_id} was not trained: {result.cause}")
            start = starts[result.rank_class]
            opened.add(
                Update(
                    client_id=f"{result.client_id}-{copy}",
                    adapter=result.adapter,
                    num_examples=result.num_examples,
                    rank_class=result.rank_class,
                    base_round=state.round,
                    digest=start.digest,
                    norms=norms_of(result.adapter, start.trained),
                )
            )
    return opened.close(), time.process_time() - began


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
