"""``flexlora simulate``: a federation of many clients in this process, or in several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from flexlora.clients.worker import Worker, worker_for
from flexlora.config.resolve import Config, resolved
from flexlora.errors import UserError
from flexlora.runs.folder import RunFolder
from flexlora.runs.lock import check_idle
from flexlora.server.app import federate
from flexlora.server.observing.observer import Observer
from flexlora.server.settings import check_config
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.engine.cohorts import limits_of, resolved_limits
from flexlora.simulations.engine.grid import InProcessGrid
from flexlora.simulations.engine.pool import Pool, make_pool
from flexlora.simulations.world.populations import Population
from flexlora.simulations.world.simulated_time import world_of
from flexlora.training.personal_store import PersonalStore

__all__ = ["make_grid", "resume", "simulate"]


def simulate(
    config: Config, out: str | Path, *, observer: Observer | None = None, overwrite: bool = False
) -> FlexLoRAStrategy:
    """Run ``config`` into the folder ``out``; model, data and settings are checked first.

    Raises:
        UserError: any mistake in the configuration, or a folder in use.
    """
    config, out = resolved(config), Path(out)
    RunFolder.check_free(out, overwrite=overwrite)
    with _ready(config, out) as (config, grid):
        return federate(grid, config, out, observer=observer, overwrite=overwrite)


def resume(out: str | Path, *, observer: Observer | None = None) -> FlexLoRAStrategy:
    """Go on with the run in ``out`` after its last whole round, with its own configuration."""
    run, config = RunFolder.open(out)
    check_idle(run.path)
    run.load_checkpoint()  # refused before the base is loaded
    with _ready(resolved(config), run.path) as (config, grid):
        return federate(grid, config, run.path, observer=observer, resume=True)


@contextmanager
def _ready(config: Config, out: Path) -> Iterator[tuple[Config, InProcessGrid]]:
    """The whole plan of the run and the grid that carries it out; its processes end with it."""
    check_config(config)
    torch.set_num_threads(config.engine.threads)
    # Other processes load while this one does.
    several = config.engine.workers > 1 or bool(config.engine.ray_address)
    pool = make_pool(config) if several else None
    try:
        worker = worker_for(config)
        _check_enough(config, len(worker.client_ids))
        config = resolved_limits(config, worker)
        yield config, make_grid(config, worker, pool, PersonalStore(out / "personal"))
    finally:
        if pool is not None:
            pool.close()


def _check_enough(config: Config, count: int) -> None:
    """Nobody comes in here who is not there: what can never be met is not waited for.

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
) -> InProcessGrid:
    """The engine of a resolved configuration.

    Raises:
        UserError: a population that cannot be.
    """
    population = Population.from_config(config, worker.client_ids)
    return InProcessGrid(
        worker,
        limits=limits_of(config),
        wire_dtype=config.wire.dtype,
        pool=pool,
        world=world_of(config, population),
        personal=personal,
        late_rounds=config.server.late_rounds,
    )
