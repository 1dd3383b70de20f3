"""A ClientApp process from its start to its reply, with a resident trainer and without.

    python -m flexlora.simulations.benchmarks.resident [--model MODEL] [--data DIR]
        [--rounds 5] [--steps 2] [--rank 8] [--threads 1] [--json FILE]
        [--adapter llama-2-7b [--wire-dtype bfloat16]]

Flower starts a process for every message; here each is a fresh interpreter that imports the app and
answers one message made as the server makes it (``resident_case.py``). Both ways answer the same
messages, in turn. The seconds that the reply reports for the training itself are taken off on both
sides: they are the same work. ``whole`` is the ratio with them.

    ratio = median seconds without a trainer / median seconds with one
    error = the largest difference between the numbers of the two replies

With ``--adapter`` nothing is trained: factors of that model's shapes go through the socket and come
back (``resident_adapter.py``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from flwr.app import Array, RecordDict
from rich.table import Table

from flexlora.aggregation import make_method
from flexlora.aggregation.engine.starts import Factoring
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.clients.trainer.sockets import connection_error
from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config
from flexlora.data.clients import client_rows
from flexlora.errors import UserError
from flexlora.lora.ranks import RankClass
from flexlora.report.console import make_console
from flexlora.server.transport.messages import encode_eval_job, encode_train_job, pack
from flexlora.simulations.benchmarks.resident_adapter import AdapterRow, adapter_rows
from flexlora.simulations.benchmarks.resident_case import read_content, write_content

__all__ = ["MessageRow", "main", "rows_of", "write_built_in"]

TARGET = 4.0
KINDS = ("query", "train", "evaluate")
REPEATED = "train, repeated"
MEASURED = ("train-seconds", "free-bytes")  # by a clock, or by what other programs leave
START = 120.0  # seconds for a base to load


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One process: seconds from its start to its reply, those of the training in it, the reply."""

    whole: float
    work: float
    reply: dict[str, Any]
    loads_torch: bool


@dataclass(kw_only=True)
class Times:
    """What the processes of one kind of message, one way, have taken."""

    answers: list[Answered] = field(default_factory=list)

    def add(self, answer: Answered) -> None:
        self.answers.append(answer)

    @property
    def last(self) -> Answered:
        return self.answers[-1]

    @property
    def whole(self) -> float:
        return median(answer.whole for answer in self.answers)

    @property
    def own(self) -> float:
        """The median without the training itself."""
        return median(answer.whole - answer.work for answer in self.answers)

    def difference(self, other: Times) -> float:
        """The largest difference between two replies to the same message."""
        pairs = zip(self.answers, other.answers, strict=True)
        return max(difference(a.reply, b.reply) for a, b in pairs)


@dataclass(frozen=True, kw_only=True)
class MessageRow:
    """One kind of message, with a trainer and without."""

    name: str
    ratio: float
    target: float
    error: float
    whole: float
    without_seconds: float
    with_seconds: float
    loads_torch: bool

    @property
    def met(self) -> bool:
        return self.ratio >= self.target and self.error == 0.0


def rows_of(kept: Mapping[str, tuple[Times, Times]]) -> list[MessageRow]:
    """Rows from the times by name: without a trainer, then with one."""
    return [
        MessageRow(
            name=name,
            ratio=without.own / resident.own,
            target=TARGET,
            error=without.difference(resident),
            whole=without.whole / resident.whole,
            without_seconds=without.own,
            with_seconds=resident.own,
            loads_torch=any(answer.loads_torch for answer in resident.answers),
        )
        for name, (without, resident) in kept.items()
    ]


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """The largest difference between two replies' numbers; infinite where one lacks something."""
    if first.keys() != second.keys():
        return float("inf")
    return max(map(_apart, first.values(), second.values()), default=0.0)


def _apart(first: Any, second: Any) -> float:
    if isinstance(first, Array):
        a, b = (np.frombuffer(array.data, dtype=array.dtype) for array in (first, second))
        return float(np.abs(a - b).max(initial=0.0)) if a.shape == b.shape else float("inf")
    if isinstance(first, float) and isinstance(second, float):
        return 0.0 if first == second or first != first != second else abs(first - second)
    return 0.0 if first == second else float("inf")


def write_built_in(folder: Path) -> Path:
    """The rows of one built-in client as a node's data folder."""
    dealt = client_rows(path="", name="", kind="client", num_clients=4, dirichlet_alpha=1.0, seed=0)
    folder.mkdir()
    for split, rows in next(iter(dealt.values())).items():
        kept = [{key: getattr(r, key) for key in ("instruction", "input", "output")} for r in rows]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def contents(
    config: Config, shapes: Mapping[str, tuple[int, int]], rank: int, server_round: int
) -> dict[str, RecordDict]:
    """What a server that has learned nothing yet sends in a round, by kind of message."""
    state = State(round=server_round - 1, change=GlobalChange.zero(shapes))
    rank_class = RankClass(name=f"rank_{rank}", rank=rank)
    start = make_method(config.method.name).start(state, rank_class, Factoring(alpha=16.0))
    payloads = {"trained": pack(start.trained, config.wire.dtype)}
    if start.carried is not None:
        payloads["carried"] = pack(start.carried, start.carried_dtype or config.wire.dtype)
    scored = {rank_class.name: payloads["trained"]}
    rounds = config.num_server_rounds
    return {
        "query": RecordDict(),
        "train": encode_train_job(
            start, payloads, server_round=server_round, num_server_rounds=rounds
        ),
        "evaluate": encode_eval_job(scored, server_round=server_round, generate=False),
    }


def answered(request: Path, node: Mapping[str, str], config: Config) -> Answered:
    """Start a ClientApp process for one message and take the time to its reply.

    Raises:
        UserError: the reply holds a cause in place of what was asked for.
    """
    reply = request.with_name("reply")
    module = "flexlora.simulations.benchmarks.resident_case"
    settings = json.dumps(config.flat())
    paths = [str(request), str(reply)]
    command = [sys.executable, "-m", module, *paths, json.dumps(node), settings]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        seconds = time.perf_counter() - started
    content = read_content(reply)
    flat = {f"{n}/{k}": v for n, record in content.items() for k, v in record.items()}
    cause = next(str(value) for key, value in flat.items() if key.endswith("/cause"))
    if cause:
        raise UserError(f"{request.name} was not answered: {cause}")
    return Answered(
        whole=seconds,
        work=float(str(flat.get("report/train-seconds", 0.0))),
        reply={key: value for key, value in flat.items() if not key.endswith(MEASURED)},
        loads_torch=line == "torch",
    )


@contextmanager
def serving(model: str, data: Path, folder: Path, threads: int) -> Iterator[Path]:
    """A trainer as ``flexlora client serve`` starts it; its socket once it listens.

    Raises:
        UserError: it ended, or does not listen in time.
    """
    path = folder / "socket"
    command = [sys.executable, "-m", "flexlora.commands.cli", "client", "serve", "--model", model]
    command += ["--data", str(data), "--socket", str(path), "--state", str(folder / "kept")]
    command += ["--set", f"engine.threads={threads}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START
        while connection_error(path):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError("the trainer does not listen; its own words are above.")
            time.sleep(0.1)
        yield path
    finally:
        process.terminate()
        process.wait()


def run(options: argparse.Namespace) -> list[MessageRow]:
    """Every message both ways, in turn; every train message once more, answered from disk."""
    with tempfile.TemporaryDirectory(prefix="flexlora-") as name:
        folder = Path(name)
        data = Path(options.data) if options.data else write_built_in(folder / "rows")
        config = Config.of(
            {
                "model.name": options.model,
                "num-server-rounds": options.rounds,
                "train.max-steps": options.steps,
                "engine.threads": options.threads,
            }
        )
        shapes = Worker(config).shapes
        plain = {"data-path": str(data), "client-id": "site"}
        kept = {kind: (Times(), Times()) for kind in (*KINDS, REPEATED)}
        with serving(options.model, data, folder, options.threads) as path:
            resident = {"trainer-socket": str(path), "client-id": "site"}
            for number in range(1, options.rounds + 1):
                for kind, content in contents(config, shapes, options.rank, number).items():
                    request = folder / f"request.{kind}"
                    write_content(request, content)
                    without, within = kept[kind]
                    without.add(answered(request, plain, config))
                    within.add(answered(request, resident, config))
                    if kind == "train":
                        # Without a trainer the same message is trained anew.
                        kept[REPEATED][0].add(replace(without.last, work=0.0))
                        again = answered(request, resident, config)
                        kept[REPEATED][1].add(replace(again, work=0.0))
        return rows_of(kept)


def main(arguments: Sequence[str] | None = None) -> list[MessageRow] | list[AdapterRow]:
    """Print the table and write its rows with ``--json``."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.adapter:
            return _adapter(options)
        rows = run(options)
    except UserError as error:
        parser.error(str(error))
    table = Table(box=None, pad_edge=False)
    table.add_column("name")
    for column in ("without s", "with s", "ratio", "target", "whole", "error", "met"):
        table.add_column(column, justify="right")
    for row in rows:
        seconds = (row.without_seconds, row.with_seconds, row.ratio, row.target, row.whole)
        cells = [f"{value:.2f}" for value in seconds]
        table.add_row(row.name, *cells, f"{row.error:.0e}", "yes" if row.met else "no")
    make_console().print(table)
    _write(options, rows)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded", help="model folder, or embedded")
    parser.add_argument("--data", default="", help="data folder (default: built-in rows)")
    parser.add_argument("--rounds", type=int, default=5, help="messages of each kind")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a training")
    parser.add_argument("--rank", type=int, default=8, help="trained rank")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads on both sides")
    parser.add_argument("--adapter", default="", help="a model whose factors go there and back")
    parser.add_argument("--wire-dtype", default="bfloat16", help="of those factors")
    parser.add_argument("--json", type=Path, help="write the rows here")
    return parser


def _adapter(options: argparse.Namespace) -> list[AdapterRow]:
    """The table of ``--adapter``."""
    with tempfile.TemporaryDirectory(prefix="flexlora-") as name:
        data = Path(options.data) if options.data else write_built_in(Path(name) / "rows")
        rows = adapter_rows(options.adapter, options.rank, options.wire_dtype, data)
    table = Table(box=None, pad_edge=False)
    table.add_column("name")
    for column in ("message MB", "grown MB", "ratio", "target", "seconds", "error", "met"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = (row.message_megabytes, row.megabytes, row.ratio, row.target, row.seconds)
        digits = (0, 0, 2, 2, 1)
        numbers = [f"{value:.{places}f}" for value, places in zip(cells, digits, strict=True)]
        table.add_row(row.name, *numbers, f"{row.error:.0e}", "yes" if row.met else "no")
    make_console().print(table)
    _write(options, rows)
    return rows


def _write(options: argparse.Namespace, rows: Sequence[MessageRow] | Sequence[AdapterRow]) -> None:
    if options.json:
        written = [{**asdict(row), "met": row.met} for row in rows]
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
