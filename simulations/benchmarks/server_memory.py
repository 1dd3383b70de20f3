"""The server's memory over the number of replies in a round: flat, or not.

    python -m flexlora.simulations.benchmarks.server_memory [--json FILE]
        [--replies 8 32] [--ways residual carried flexlora fedavg] [--rounds 1]
        [--model meta-llama/Llama-2-7b-hf] [--layers N] [--rank 4] [--wire-dtype float32]
        [--through pulled superlink] [--orders kept reversed] [--echo-megabytes 320]

Every case is a process of its own (``server_memory_case.py``): the product's strategy, from meeting
the nodes to the last round, over replies of random factors in the shape of a public model, here
40 MB each. ``pulled`` is a grid that makes a reply when it is pulled; ``superlink`` is Flower's,
with nodes that speak its fleet API. ``reversed`` is the worst order for a sum in one fixed order:
whoever is to be added first answers last. ``fedavg`` is Flower's own strategy, which is what a user
has today. ``--echo-megabytes`` measures instead one message of that size to a node and back.

    ratio = growth of the server's peak at the most replies / at the fewest
    error = 0: a case whose replies do not all count ends the benchmark

``G`` is kept at rank 16, which the fewest replies fill too: its own size is the cap's matter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table

from flexlora.report.console import make_console
from flexlora.simulations.benchmarks.server_memory_answers import ECHO, FEDAVG, ServerCase
from flexlora.simulations.benchmarks.server_memory_flower import measured_by_flower

__all__ = ["ServerMemoryRow", "main"]

TARGET = 1.1
LIMIT = 1800.0  # seconds for one case
WAYS = ("residual", "carried", "flexlora", FEDAVG)


@dataclass(frozen=True, kw_only=True)
class ServerMemoryRow:
    """One way through one grid at the fewest and the most replies."""

    name: str
    ratio: float
    target: float
    error: float
    replies: tuple[int, ...]
    megabytes: tuple[float, ...]
    round_seconds: tuple[float, ...]
    reply_megabytes: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.target and self.error == 0.0

    @property
    def megabytes_a_second(self) -> float:
        """What goes through in a round of the most replies, the server's own work included."""
        return self.reply_megabytes * self.replies[-1] / self.round_seconds[-1]


def measured(case: ServerCase, through: str) -> dict[str, float]:
    """One case in a process of its own."""
    if through == "superlink":
        return measured_by_flower(case, LIMIT)
    module = "flexlora.simulations.benchmarks.server_memory_case"
    command = [sys.executable, "-m", module, case.to_json()]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ), timeout=LIMIT
    )
    return json.loads(done.stdout)


def row_of(case: ServerCase, through: str, replies: Sequence[int]) -> ServerMemoryRow:
    """The case at each number of replies.

    Raises:
        RuntimeError: a peak that grew by less than one reply, which cannot have been measured.
    """
    found = []
    for count in replies:
        one = measured(replace(case, replies=count), through)
        found.append(one)
        summary = f"{one['peak'] / 1e6:.0f} MB, {one['seconds']:.1f} s a round"
        print(f"{case.way}, {through}, {count} replies: {summary}", file=sys.stderr)
        if one["peak"] < one["reply_bytes"]:
            raise RuntimeError(
                f"the peak grew by {one['peak']:,.0f} bytes, expected at least one reply's "
                f"{one['reply_bytes']:,.0f}. Was it higher before the rounds began?"
            )
    name = f"{case.way}, {through}"
    return ServerMemoryRow(
        name=f"{name}, worst order" if case.reversed else name,
        ratio=found[-1]["peak"] / found[0]["peak"],
        target=TARGET,
        error=0.0,
        replies=tuple(replies),
        megabytes=tuple(one["peak"] / 1e6 for one in found),
        round_seconds=tuple(one["seconds"] for one in found),
        reply_megabytes=found[0]["reply_bytes"] / 1e6,
    )


def run(options: argparse.Namespace) -> list[ServerMemoryRow]:
    """A row per way, grid and order; FedAvg knows no order."""
    base = ServerCase(
        way=ECHO,
        replies=1,
        model=options.model,
        layers=options.layers,
        rank=options.rank,
        wire_dtype=options.wire_dtype,
        rounds=options.rounds,
    )
    rows = []
    for through in options.through:
        for way in options.ways:
            for order in options.orders if way != FEDAVG else ["kept"]:
                case = replace(base, way=way, reversed=order == "reversed")
                rows.append(row_of(case, through, options.replies))
    return rows


def main(arguments: Sequence[str] | None = None) -> list[ServerMemoryRow]:
    """Print the table and write its rows with ``--json``."""
    options = _parser().parse_args(arguments)
    if options.echo_megabytes:
        _print_echo(options)
        return []
    rows = run(options)
    _print(rows, options.replies)
    if options.json:
        written = [{**asdict(row), "met": row.met} for row in rows]
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replies", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="methods, and fedavg")
    parser.add_argument("--rounds", type=int, default=1, help="in round 1 nothing is carried yet")
    parser.add_argument("--model", default="meta-llama/Llama-2-7b-hf", help="whose shapes")
    parser.add_argument("--layers", type=int, default=0, help="of the model (0: all)")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--wire-dtype", default="float32")
    parser.add_argument(
        "--through", nargs="+", choices=("pulled", "superlink"), default=["pulled", "superlink"]
    )
    parser.add_argument(
        "--orders", nargs="+", choices=("kept", "reversed"), default=["kept", "reversed"]
    )
    parser.add_argument("--echo-megabytes", type=int, default=0, help="one message and back")
    parser.add_argument("--json", type=Path, help="write the rows here")
    return parser


def _print(rows: Sequence[ServerMemoryRow], replies: Sequence[int]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("server")
    columns = [f"MB at {count}" for count in replies]
    columns += ["ratio", "target", "met", *(f"round s at {count}" for count in replies), "MB/s"]
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            *(f"{value:.0f}" for value in row.megabytes),
            f"{row.ratio:.2f}",
            f"<= {row.target:g}",
            "yes" if row.met else "no",
            *(f"{value:.1f}" for value in row.round_seconds),
            f"{row.megabytes_a_second:.0f}",
        )
    make_console().print(table)


def _print_echo(options: argparse.Namespace) -> None:
    case = ServerCase(way=ECHO, replies=1, rounds=1, echo_bytes=options.echo_megabytes * 10**6)
    found = measured(case, "superlink")
    make_console().print(
        f"{options.echo_megabytes} MB to a node and back through a SuperLink: "
        f"{found['seconds']:.1f} s, the ServerApp's peak grew by {found['peak'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
