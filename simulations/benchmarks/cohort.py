"""Client-trainings a second in simulation, side by side with what a person writes today.

    python -m flexlora.simulations.benchmarks.cohort [--json FILE] [--model DIR] [--data DIR]
    python -m flexlora.simulations.benchmarks.cohort --flat [--model DIR] [--data DIR]

Without a flag, programs on this machine's CPU cores, all with the same clients of unequal ranks,
starts, batches and rounds, on all cores, none evaluating:

    flower         a Flower app on Ray whose PEFT client reads its model for every message
    flower-cached  the same, the model kept in each of Ray's processes
    loop           a PEFT loop in one process;   loop-N  the same loop in N processes
    ours-W         ``flexlora simulate`` with ``engine.workers=W``

``steady`` is client-trainings a second after the first rounds, with ``--clock cpu`` a second of the
CPU; ``whole`` is the time of the whole process. The Flower peers only collect what comes back,
since Flower cannot average unequal ranks, and find a SuperLink running: both in their favour. Ours
aggregates, takes the loss of every client before and after training, and writes its run folder. A
ratio above 1 is in our favour; programs take turns, and of ``--repeats`` turns each has its best.
``error`` is how far a peer's losses in round 1 are from ours: it trained the same. The other
mode is ``cohort_flat`` (memory over rounds).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.table import Table

from flexlora.errors import UserError
from flexlora.report.console import make_console
from flexlora.simulations.benchmarks.cohort_flat import flat_rows
from flexlora.simulations.benchmarks.cohort_peers.work import Work
from flexlora.simulations.benchmarks.cohort_rows import CohortRow, print_rows, write_rows
from flexlora.simulations.benchmarks.cohort_runs import (
    FLOWER,
    LOOP,
    Program,
    Run,
    check,
    disagreement,
    launch,
    programs,
)
from flexlora.simulations.benchmarks.cohort_work import Size, prepare

__all__ = ["compare", "main"]

ALLOWED_ERROR = 1e-4
STEADY_TARGETS = {FLOWER: 1.5, LOOP: 1.2}  # by the first word of a program's name
WHOLE_TARGETS = {FLOWER: 2.0}


def main(arguments: Sequence[str] | None = None) -> list[CohortRow]:
    options = _parser().parse_args(arguments)
    size = _plain(Size, options)
    if options.flat:
        title, rows = "memory over rounds", flat_rows(size, options.population)
    else:
        title, rows = "cohort, ours over theirs", _compared(size, options)
    print_rows(title, rows)
    if options.json:
        write_rows(options.json, rows)
    return rows


def _plain(kind: type, options: argparse.Namespace):
    values = {field.name: getattr(options, field.name) for field in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _parser() -> argparse.ArgumentParser:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--json", help="write the rows to this file")
    add("--model", default="embedded", help="folder of the base")
    add("--data", default="", help="folder of JSONL (default: the built-in tasks)")
    add("--clients", type=int, default=16, help="clients, all of which train in every round")
    add("--rounds", type=int, default=6)
    add("--steps", type=int, default=8, help="optimizer steps of a client in a round")
    add("--batch-size", type=int, default=4, help="rows of a step")
    add("--max-length", type=int, default=128)
    add("--ranks", type=int, nargs="+", default=[2, 4, 8, 16], help="dealt to the clients in turn")
    add("--method", default="flexlora", help="of ours; flexlora's clients do what the peers do")
    add("--seed", type=int, default=0)
    add("--warmup", type=int, default=2, help="rounds before the steady state")
    add("--repeats", type=int, default=1)
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: one core on a busy machine")
    add("--cores", type=int, default=cores)
    add("--workers", type=int, nargs="+", default=_workers(cores), help="of ours")
    add("--only", nargs="+", help="names of programs; ours always run")
    add("--flat", action="store_true", help="the memory of a large population over rounds")
    add("--population", type=int, default=1613, help="clients of --flat")
    return parser


def _workers(cores: int) -> list[int]:
    """One, and as many as there are cores where this FlexLoRA has a pool of workers."""
    pool = importlib.util.find_spec("flexlora.simulations.engine.pool")
    return [1, cores] if pool is not None and cores > 1 else [1]


def _compared(size: Size, options: argparse.Namespace) -> list[CohortRow]:
    if not 0 <= options.warmup < size.rounds:
        raise UserError(
            f"--warmup is {options.warmup}, expected 0 to {size.rounds - 1}; raise --rounds."
        )
    chosen = programs(options.cores, workers=tuple(options.workers))
    known = [program.name for program in chosen if not program.ours]
    odd = sorted(set(options.only or ()) - set(known))
    if odd:
        raise UserError(f"--only got '{odd[0]}', expected some of {', '.join(known)}.")
    wanted = set(options.only or known)
    chosen = [program for program in chosen if program.ours or program.name in wanted]
    with tempfile.TemporaryDirectory(prefix="cohort") as folder:
        work = prepare(size, Path(folder))
        runs = compare(chosen, work, options.repeats, Path(folder))
    clients = len(work.clients)
    rates = {
        name: max(run.steady_rate(clients, options.warmup, options.clock) for run in done)
        for name, done in runs.items()
    }
    unit = "trainings/s" if options.clock == "wall" else "trainings/CPU s"
    _print_runs(chosen, runs, rates, f"{clients} clients a round, steady after {options.warmup}")
    return _rows(chosen, runs, rates, work, unit)


def compare(
    chosen: Sequence[Program], work: Work, repeats: int, folder: Path
) -> dict[str, list[Run]]:
    """All programs in turn, ``repeats`` times over; every run's work is checked."""
    runs: dict[str, list[Run]] = {program.name: [] for program in chosen}
    for repeat in range(repeats):
        for program in chosen:
            run = launch(program, work, folder / f"{program.name}_{repeat}.json")
            check(program, run, work)
            runs[program.name].append(run)
    return runs


def _rows(
    chosen: Sequence[Program],
    runs: dict[str, list[Run]],
    rates: dict[str, float],
    work: Work,
    unit: str,
) -> list[CohortRow]:
    """Ours over every peer, steady and whole; the best turn of each."""
    whole = {name: min(run.whole_seconds for run in done) for name, done in runs.items()}
    ours = [program.name for program in chosen if program.ours]
    rows = []
    for peer in (program.name for program in chosen if not program.ours):
        kind = peer.partition("-")[0]
        control = runs[ours[0]][0]
        error = max(disagreement(run, control, work) for run in runs[peer])
        for own in ours:
            rows.append(
                CohortRow(
                    name=f"steady, {own} over {peer}",
                    ratio=rates[own] / rates[peer],
                    target=STEADY_TARGETS[kind],
                    ours=rates[own],
                    other=rates[peer],
                    unit=unit,
                    error=error,
                    allowed_error=ALLOWED_ERROR,
                )
            )
            rows.append(
                CohortRow(
                    name=f"whole, {own} over {peer}",
                    ratio=whole[peer] / whole[own],
                    target=WHOLE_TARGETS.get(kind, 0.0),
                    ours=whole[own],
                    other=whole[peer],
                    unit="s",
                    error=error,
                    allowed_error=ALLOWED_ERROR,
                )
            )
    return rows


def _print_runs(
    chosen: Sequence[Program], runs: dict[str, list[Run]], rates: dict[str, float], title: str
) -> None:
    """What each program did by itself, the best of its turns."""
    table = Table(title=title)
    for column in ("program", "what", "steady", "startup s", "whole s"):
        table.add_column(column, justify="left" if column in ("program", "what") else "right")
    for program in chosen:
        done = runs[program.name]
        table.add_row(
            program.name,
            program.description,
            f"{rates[program.name]:.2f}",
            f"{min(run.startup_seconds for run in done):.1f}",
            f"{min(run.whole_seconds for run in done):.1f}",
        )
    make_console().print(table)


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        print(f"cohort: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None
