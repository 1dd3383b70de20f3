"""``flexlora tune``: how many clients in one pass are fastest on this machine, by measuring it.

Real clients of the configuration train a few real steps from the first round's start, in cohorts of
1, 2, 4, ... The smallest size within 3 % of the fastest is written into a configuration file: a
measured size is another plan than the cost model's, and a plan is part of what a run repeats.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w
import torch
from rich.table import Table

from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.clients.worker import Worker, worker_for
from flexlora.config.resolve import Config, resolved
from flexlora.errors import UserError
from flexlora.report.console import make_console
from flexlora.server.settings import check_config, factoring_of
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.engine.cohorts import MOST_CLIENTS, resolved_limits
from flexlora.simulations.simulate import make_grid
from flexlora.training.local import train
from flexlora.training.out_of_memory import free_memory, is_out_of_memory
from flexlora.wire.jobs import TrainJob

__all__ = ["Measured", "fastest", "measured", "tune"]

STEPS, REPEATS = 3, 3
AS_FAST = 0.97  # of the fastest: fewer clients in a pass lose less when one of them fails
HOPELESS = 0.8


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One size of cohort and the optimizer steps of a client that it makes in a second."""

    clients: int
    steps_per_second: float


def tune(config: Config, *, out: str | None = None) -> int:
    """Print the table and the choice; with ``out`` write the configuration with it.

    Raises:
        UserError: a configuration that cannot run, or ``out`` is in use.
    """
    if out is not None:
        _check_writable(Path(out))
    check_config(config)
    run = resolved(config)
    torch.set_num_threads(run.engine.threads)
    worker = worker_for(run)
    sizes = list(measured(run, worker))
    best = fastest(sizes)
    console = make_console()
    console.print(_table(sizes, best))
    model = resolved_limits(
        run.with_values({"engine.cohort-size": 0, "engine.cohort-tokens": 0}), worker
    )
    text = f"The cost model would take passes of up to {model.engine.cohort_tokens} tokens."
    console.print(text, soft_wrap=True)
    pass_tokens = run.train.per_device_train_batch_size * run.train.max_length
    chosen = {
        "engine.cohort-size": best.clients,
        "engine.cohort-tokens": best.clients * pass_tokens,
    }
    if out is None:
        spelled = " ".join(f"--set {key}={value}" for key, value in chosen.items())
        console.print(f"Use it with {spelled}", soft_wrap=True)
    else:
        _write(config.with_values(chosen), Path(out))
        console.print(f"Written: {out} (flexlora simulate --config {out})", soft_wrap=True)
    return 0


def measured(config: Config, worker: Worker) -> Iterator[Measured]:
    """Sizes of 1, 2, 4, ... clients, until they are many, run out of memory or fall far behind."""
    jobs = first_round(config, worker)
    best, size = 0.0, 1
    while size <= min(len(jobs), MOST_CLIENTS):
        try:
            rate = _rate(worker, jobs[:size])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            free_memory()
            return
        yield Measured(clients=size, steps_per_second=rate)
        best = max(best, rate)
        if rate < HOPELESS * best:
            return
        size *= 2


def fastest(sizes: Sequence[Measured]) -> Measured:
    """The smallest size that is as good as the fastest.

    Raises:
        UserError: not even one client could be trained.
    """
    if not sizes:
        raise UserError(
            "one client alone runs out of memory; lower train.per-device-train-batch-size or see "
            "`flexlora plan`."
        )
    best = max(size.steps_per_second for size in sizes)
    return next(size for size in sizes if size.steps_per_second >= AS_FAST * best)


def first_round(config: Config, worker: Worker) -> list[TrainJob]:
    """What the clients of one base would be sent in round 1, highest ranks and longest rows first.

    So every size holds the dearest clients of its kind, as a full cohort may.
    """
    strategy = FlexLoRAStrategy(config)
    strategy.meet(make_grid(resolved_limits(config, worker), worker))
    state = State(round=0, change=GlobalChange.zero(strategy.roster.shapes, torch.float32))
    starts = {
        name: strategy.method.start(state, rank_class, factoring_of(config)).sealed()
        for name, rank_class in strategy.roster.rank_classes.items()
    }
    jobs = [
        TrainJob(
            client_id=client_id,
            server_round=1,
            num_server_rounds=config.num_server_rounds,
            start=starts[member.rank_class.name],
        )
        for client_id, member in strategy.roster.members.items()
    ]
    jobs.sort(
        key=lambda job: (-job.start.rank_class.largest, -_longest(worker, job), job.client_id)
    )
    first = worker.pass_key(jobs[0].client_id)
    return [job for job in jobs if worker.pass_key(job.client_id) == first]


def _longest(worker: Worker, job: TrainJob) -> int:
    return max(len(example.input_ids) for example in worker.train_rows(job))


def _rate(worker: Worker, jobs: Sequence[TrainJob]) -> float:
    """Steps of a client a second; the best of a few trainings, after one that warms up."""
    settings = worker.settings.model_copy(update={"max_steps": STEPS})
    rows = [worker.train_rows(job) for job in jobs]
    slots = worker.slots_of(worker.quantization_of(jobs[0].client_id))
    best = float("inf")
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        train(slots, jobs, rows, settings, pad_token_id=worker.base.pad_token_id)
        best = min(best, time.perf_counter() - began)
    return len(jobs) * STEPS / best


def _table(sizes: Sequence[Measured], best: Measured) -> Table:
    table = Table(title="Clients in one pass", title_justify="left", box=None, pad_edge=False)
    for column in ("clients", "client steps a second", "against one", ""):
        table.add_column(column, justify="right")
    for size in sizes:
        ratio = size.steps_per_second / sizes[0].steps_per_second
        mark = "chosen" if size == best else ""
        table.add_row(str(size.clients), f"{size.steps_per_second:.2f}", f"{ratio:.2f}", mark)
    return table


def _check_writable(out: Path) -> None:
    """Refuse an output file before the minutes of measuring.

    Raises:
        UserError: the file is there, or cannot be made.
    """
    try:
        out.touch(exist_ok=False)
        out.unlink()
    except FileExistsError:
        raise UserError(f"'{out}' already exists; give another --out.") from None
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error.strerror}.") from None


def _write(config: Config, out: Path) -> None:
    tree: dict = {}
    for key, value in config.changed().items():
        table, _, leaf = key.rpartition(".")
        (tree.setdefault(table, {}) if table else tree)[leaf] = value
    try:
        out.write_text(tomli_w.dumps(tree), encoding="utf-8")
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error.strerror}.") from None
