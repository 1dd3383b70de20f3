"""A round over a real SuperLink with 10, 100 and 1,000 nodes, in two states of the code.

    python -m flexlora.simulations.benchmarks.fleet [--before COMMIT] [--nodes 10 100 1000]
        [--rounds 2] [--model embedded] [--real] [--tls] [--delay-ms 100 --bytes-per-second 125000]
        [--set KEY=VALUE] [--limit SECONDS] [--json FILE]

Server and nodes are those of a deployment, over loopback: ``flower-superlink`` with a database,
``flower-superexec``, the ServerApp that it starts (``fleet_deployment.py``), and stub nodes that
speak Flower's fleet API request by request (``fleet_node.py``) and answer without training
(``fleet_case.py``). Their process is not the server's: its processor seconds are a column of their
own, which on real nodes would be theirs. ``--real`` starts SuperNodes with resident trainers
instead (``fleet_real.py``), and its seconds are those beyond the training.

``--before`` measures a commit beside this tree: it is checked out into a folder of its own for as
long as this runs, and these very files are put into it. The columns are for one round, between the
row of round 0 and the last: seconds (the median), processor seconds of the SuperLink, the ServerApp
and the nodes, a node's requests and bytes; then the peaks of SuperLink and ServerApp, the database.

    ratio = seconds a round / the target: 120, and 8 beyond training for real nodes
    error = the share of replies that the rounds lack

A case that has not ended within ``--limit`` is stopped. Where it has closed no round, its seconds
are those of the row before it times the nodes, marked by ``~``: a lower bound, since what a request
costs grows with the nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from flexlora.report.console import make_console
from flexlora.simulations.benchmarks.fleet_case import FleetCase
from flexlora.simulations.benchmarks.same_adapters import tree_of

__all__ = ["FleetRow", "main", "row_of"]

TARGET_SECONDS = 120.0  # a round of empty training at 1,000 nodes on two cores
REAL_SECONDS = 8.0  # a round of three real nodes beyond its training
RUN = "flexlora.simulations.benchmarks.fleet_run"
HERE = Path(__file__).resolve().parent
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class FleetRow:
    """One number of nodes in one state of the code; per round, and bytes and calls per node."""

    name: str
    ratio: float
    target: float
    error: float
    nodes: int
    seconds: float
    extrapolated: bool
    superlink_cpu: float
    serverapp_cpu: float
    nodes_cpu: float
    requests: float
    calls: dict[str, float]
    kilobytes_down: float
    kilobytes_up: float
    superlink_megabytes: float
    serverapp_megabytes: float
    database_megabytes: float
    start_seconds: float
    retries: int
    refusals: int
    stopped: str

    @property
    def met(self) -> bool:
        return self.ratio <= self.target and self.error == 0.0


def row_of(
    name: str, case: FleetCase, found: dict[str, Any], smaller: FleetRow | None = None
) -> FleetRow:
    """The row of what ``fleet_run`` has found; without a closed round, ``smaller`` scaled up."""
    nan = float("nan")
    seconds = found.get("median_seconds", nan)
    cpu = found.get("cpu", {"superlink": nan, "serverapp": nan})
    if not found["rounds"] and smaller is not None:
        more = case.nodes / smaller.nodes
        seconds = smaller.seconds * more
        cpu = {"superlink": smaller.superlink_cpu * more, "serverapp": smaller.serverapp_cpu * more}
    trained = sum(found["ok"])
    if found.get("train_seconds"):
        pairs = zip(found["round_seconds"], found["train_seconds"], strict=False)
        seconds = median(whole - training for whole, training in pairs)
    return FleetRow(
        name=name,
        ratio=seconds / (REAL_SECONDS if case.real else TARGET_SECONDS),
        target=1.0,
        error=1.0 - trained / (case.nodes * case.rounds),
        nodes=case.nodes,
        seconds=seconds,
        extrapolated=not found["rounds"],
        superlink_cpu=cpu["superlink"],
        serverapp_cpu=cpu["serverapp"],
        nodes_cpu=found.get("stub_cpu", nan),
        requests=found.get("requests", nan),
        calls=found.get("calls", {}),
        kilobytes_down=found.get("bytes_down", nan) / 1e3,
        kilobytes_up=found.get("bytes_up", nan) / 1e3,
        superlink_megabytes=found["peaks"]["superlink"] / MB,
        serverapp_megabytes=found["peaks"]["serverapp"] / MB,
        database_megabytes=found["database_bytes"] / MB,
        start_seconds=found.get("start_seconds", nan),
        retries=found["retries"],
        refusals=found["refusals"],
        stopped=found.get("stopped", ""),
    )


def measured(case: FleetCase, tree: Path) -> dict[str, Any]:
    """A case in a tree, whose ``flexlora`` all of its processes import.

    Raises:
        RuntimeError: the case ended without numbers, or its processes imported another tree.
    """
    paths = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", RUN, case.to_json()],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=tree,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        output, _ = process.communicate()
    finally:
        process.terminate()  # it ends its own processes; nothing where it is over
        process.wait()
    if process.returncode:
        raise RuntimeError(f"the case of {case.nodes} nodes failed; its words are above.")
    found = json.loads(output.splitlines()[-1])
    if Path(found["tree"]).resolve() != (tree / "flexlora").resolve():
        raise RuntimeError(f"{found['tree']} was measured, expected {tree / 'flexlora'}.")
    return found


@contextlib.contextmanager
def _with_these_files(commit: str) -> Iterator[Path]:
    """A commit in a folder of its own, with this benchmark in it."""
    with tree_of(commit) as tree:
        for file in HERE.glob("fleet*.py"):
            shutil.copy(file, tree / "simulations" / "benchmarks" / file.name)
        yield tree


def run(options: argparse.Namespace) -> list[FleetRow]:
    """A row per number of nodes, before and after in turn."""
    rows: list[FleetRow] = []
    last: dict[str, FleetRow] = {}  # by side
    with contextlib.ExitStack() as stack:
        trees = {"after": HERE.parents[1]}
        if options.before:
            before = stack.enter_context(_with_these_files(options.before))
            trees = {"before": before, **trees}
        for nodes in options.nodes:
            case = FleetCase(
                nodes=nodes,
                rounds=options.rounds,
                model=options.model,
                tls=options.tls or options.real,
                real=options.real,
                stored=not options.no_database,
                delay_ms=options.delay_ms,
                bytes_per_second=options.bytes_per_second,
                settings=tuple(options.set),
                limit_seconds=options.limit,
            )
            for word, tree in trees.items():
                if word in options.only:
                    found = measured(case, tree)
                    print(json.dumps({"side": word, **found}), file=sys.stderr)
                    last[word] = row_of(
                        f"{nodes}{' real' * options.real} nodes, {word}",
                        case,
                        found,
                        last.get(word),
                    )
                    rows.append(last[word])
    return rows


def main(arguments: Sequence[str] | None = None) -> list[FleetRow]:
    """Print the table and write its rows with ``--json``."""
    options = _parser().parse_args(arguments)
    rows = run(options)
    _print(rows)
    if options.json:
        written = [{**asdict(row), "met": row.met} for row in rows]
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", choices=("embedded", "smollm2-135m"), default="embedded")
    parser.add_argument("--before", default="", help="a commit to measure beside this tree")
    parser.add_argument(
        "--only", nargs="+", choices=("before", "after"), default=["before", "after"]
    )
    parser.add_argument("--tls", action="store_true", help="between the nodes and the SuperLink")
    parser.add_argument("--real", action="store_true", help="SuperNodes that train, over TLS")
    parser.add_argument("--no-database", action="store_true", help="the SuperLink's memory only")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="of each node's link, one way")
    parser.add_argument("--bytes-per-second", type=float, default=0.0, help="of each node's link")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the run"
    )
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for one case")
    parser.add_argument("--json", type=Path, help="write the rows here")
    return parser


def _print(rows: Sequence[FleetRow]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    columns = ["round s", "link s", "app s", "nodes s", "calls", "KB down", "KB up"]
    columns += ["link MB", "app MB", "db MB", "start", "error", "met"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cpu = (row.superlink_cpu, row.serverapp_cpu, row.nodes_cpu)
        sizes = (row.kilobytes_down, row.kilobytes_up)
        memory = (row.superlink_megabytes, row.serverapp_megabytes, row.database_megabytes)
        table.add_row(
            row.name,
            f"{'~' if row.extrapolated else ''}{row.seconds:.1f}",
            *(f"{value:.1f}" for value in cpu),
            *(f"{value:.0f}" for value in (row.requests, *sizes, *memory)),
            f"{row.start_seconds:.1f}",
            f"{row.error:.2f}",
            "yes" if row.met else "no",
        )
    console = make_console()
    console.print(table)
    for row in rows:
        if row.stopped:
            console.print(f"{row.name}: stopped before its last round, {row.stopped}")


if __name__ == "__main__":
    main()
