"""``flexlora simulate``: a federation of many clients in this process."""

from __future__ import annotations

from pathlib import Path

import torch
from flexlora.clients.worker import worker_for
from flexlora.server.app import federate
from flexlora.server.observer import Observer
from flexlora.server.settings import ServerSettings
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.engine import InProcessGrid

from flexlora.config import Config, resolved
from flexlora.runs import RunFolder

__all__ = ["resume", "simulate"]


def simulate(
    config: Config, out: str | Path, *, observer: Observer | None = None, overwrite: bool = False
) -> FlexLoRAStrategy:
    """Run ``config`` into the folder ``out``; model, data and settings are checked first.

    Raises:
        UserError: any mistake in the configuration, or a folder in use.
    """
    config, out = resolved(config), Path(out)
    RunFolder.check_free(out, overwrite=overwrite)
    return federate(_grid(config), config, out, observer=observer, overwrite=overwrite)


def resume(out: str | Path, *, observer: Observer | None = None) -> FlexLoRAStrategy:
    """Go on with the run in ``out`` after its last whole round, with its own configuration."""
    run, config = RunFolder.open(out)
    run.load_checkpoint()  # refused before the base is loaded
    config = resolved(config)
    return federate(_grid(config), config, run.path, observer=observer, resume=True)


def _grid(config: Config) -> InProcessGrid:
    ServerSettings.from_config(config)
    torch.set_num_threads(config["engine.threads"])
    return InProcessGrid(
        worker_for(config),
        cohort_size=config["engine.cohort-size"] or 8,
        wire_dtype=config["wire.dtype"],
    )
