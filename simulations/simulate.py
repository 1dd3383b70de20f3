"""``flexlora simulate``: a federation of many clients in this process, or in several."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from flexlora.clients.worker import Worker, worker_for
from flexlora.config.paths import expanded
from flexlora.config.resolve import Config, resolved
from flexlora.data.held_out import check_held_out
from flexlora.errors import RunFailed, UserError, one_line
from flexlora.report import write_report
from flexlora.runs.canary_file import CanaryRecord
from flexlora.runs.folder import RunFolder
from flexlora.runs.lock import check_idle
from flexlora.server.app import federate
from flexlora.server.observing.observer import Observer
from flexlora.server.settings import check_config
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.engine.canary_clients import CanaryClients, canary_record
from flexlora.simulations.engine.cohorts import limits_of, resolved_limits
from flexlora.simulations.engine.grid import FAILED_COHORTS, InProcessGrid, rounds_kept
from flexlora.simulations.engine.pool import LocalPool, Pool, make_pool
from flexlora.simulations.hostile.pool import with_hostile
from flexlora.simulations.samples import write_samples_of
from flexlora.simulations.terminal import TerminalObserver
from flexlora.simulations.world.populations import Population
from flexlora.simulations.world.simulated_time import world_of
from flexlora.training.personal_store import PersonalStore

__all__ = ["make_grid", "resume", "run_in_terminal", "simulate"]


def run_in_terminal(
    config: Config,
    out: Path,
    *,
    console: Console,
    overwrite: bool = False,
    go_on: bool = False,
    allow_changed: bool = False,
) -> None:
    """Run ``config`` into ``out`` with a table per round, a summary and ``report.html``.

    With ``go_on`` the run in ``out`` is resumed under its own configuration.

    Raises:
        UserError: see ``simulate`` and ``resume``.
        RunFailed: no client was trained; the page is written first.
    """
    if go_on:
        _, config = RunFolder.open(out)
    failed: RunFailed | None = None
    with TerminalObserver(console, personal_rank=config.personal.rank) as observer:
        try:
            if go_on:
                resume(out, observer=observer, allow_changed=allow_changed)
            else:
                simulate(config, out, observer=observer, overwrite=overwrite)
        except RunFailed as error:
            failed = error
    observer.summary(RunFolder(out).metrics())
    try:
        page = write_report(out)
    except Exception as error:  # the run is complete, whatever is wrong with its page
        print(
            f"flexlora: the run is whole, but its report was not written ({one_line(error)}).",
            file=sys.stderr,
        )
    else:
        console.print(f"\nReport: {page}", soft_wrap=True)
    if failed is not None:
        raise failed


def simulate(
    config: Config,
    out: str | Path,
    *,
    observer: Observer | None = None,
    overwrite: bool = False,
    go_on: bool = False,
    allow_changed: bool = False,
) -> FlexLoRAStrategy:
    """Run ``config`` into the folder ``out``; settings, model and data are checked first.

    With ``go_on`` the run in ``out``, whose configuration this is, continues after its last
    complete round, with ``allow_changed`` also on another base or other rows.

    Raises:
        UserError: any mistake in the configuration, or a folder in use.
        RunFailed: no client was trained in any round.
    """
    config, out = resolved(config), Path(expanded(str(out)))
    if not go_on:
        RunFolder.check_free(out, overwrite=overwrite)
        if out.is_dir():
            (out / FAILED_COHORTS).unlink(missing_ok=True)
    check_config(config)
    torch.set_num_threads(config.engine.threads)
    several = config.engine.workers > 1 or bool(config.engine.ray_address)
    pool = make_pool(config) if several else None  # other processes load while this one does
    try:
        worker = worker_for(config)
        check_held_out(worker.rows, config.data.held_out_tasks)
        if observer is not None:
            observer.read(worker.data.foreign_layouts())
        _check_enough(config, len(worker.client_ids))
        config = resolved_limits(config, worker)
        kept = rounds_kept(config.server.late_rounds, config.server.keep_checkpoints)
        personal = PersonalStore(out / "personal", rounds_kept=kept)
        canaries = canary_record(config, worker, out, go_on=go_on)
        grid = make_grid(config, worker, pool, personal, out, canaries)
        strategy = federate(
            grid,
            config,
            out,
            observer=observer,
            overwrite=overwrite,
            resume=go_on,
            sources=worker.sources(),
            allow_changed=allow_changed,
            flag="--allow-changed",
            canaries=canaries,
        )
        write_samples_of(strategy, worker, out, personal)
        return strategy
    finally:
        if pool is not None:
            pool.close()


def resume(
    out: str | Path, *, observer: Observer | None = None, allow_changed: bool = False
) -> FlexLoRAStrategy:
    """Continue the run in ``out`` after its last complete round, with its own configuration.

    Raises:
        UserError: nothing to go on with, or another base or other rows than the run's.
    """
    run, config = RunFolder.open(out)
    check_idle(run.path)
    run.load_checkpoint()  # refused before the base is loaded
    return simulate(config, run.path, observer=observer, go_on=True, allow_changed=allow_changed)


def _check_enough(config: Config, count: int) -> None:
    """Refuse a quorum above the number of clients: no client joins a simulation later.

    Raises:
        UserError: more clients are asked for than the data makes.
    """
    for key in ("server.quorum", "server.min-nodes"):
        if (wanted := config.flat()[key]) > count:
            raise UserError(
                f"{key} is {wanted}, but the data makes {count} clients, so that it can never "
                "be met; lower it, or raise clients.count."
            )


def make_grid(
    config: Config,
    worker: Worker,
    pool: Pool | None = None,
    personal: PersonalStore | None = None,
    out: Path | None = None,
    canaries: CanaryRecord | None = None,
) -> InProcessGrid:
    """The engine of a resolved configuration, for the run in ``out``.

    Raises:
        UserError: a population or an attack that cannot be.
    """
    population = Population.from_config(config, worker.client_ids)
    added = None
    if canaries is not None:
        like = worker.capability(worker.client_ids[0], probed=False)
        added = CanaryClients(canaries=canaries.canaries, like=replace(like, cause=""))
    return InProcessGrid(
        worker,
        limits=limits_of(config),
        wire_dtype=config.wire.dtype,
        pool=with_hostile(pool or LocalPool(worker), config, worker.client_ids),
        world=world_of(config, population),
        personal=personal,
        late_rounds=config.server.late_rounds,
        failed_file=None if out is None else out / FAILED_COHORTS,
        canaries=added,
    )
