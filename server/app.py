"""The Flower ServerApp, and ``federate``: the run that every engine shares.

``flwr run .`` calls ``app``; ``flexlora simulate`` calls ``federate`` with a grid of its own.
"""

from __future__ import annotations

import logging
from pathlib import Path

from flexlora.server.observer import LogObserver, Observer
from flexlora.server.settings import ServerSettings
from flexlora.server.strategy import FlexLoRAStrategy
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flexlora.config import Config
from flexlora.models import resolve_name
from flexlora.peft_folder import save_adapter
from flexlora.runs import RunFolder

__all__ = ["app", "federate", "write_adapters"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the run's configuration and leave a run folder."""
    config = Config(context.run_config)
    logger = logging.getLogger("flwr")
    run = RunFolder.create(Path(config["out"] or f"runs/{context.run_id}"), config)
    logger.info("run folder: %s", run.path.resolve())
    federate(grid, config, run, LogObserver(logger))


def federate(
    grid: Grid, config: Config, run: RunFolder, observer: Observer | None, *, resume: bool = False
) -> FlexLoRAStrategy:
    """Rounds over ``grid`` into ``run``; whatever ends them, the last good round's adapters stay.

    Raises:
        UserError: a setting that cannot be, too few nodes, no client that can train, nothing to
            resume.
    """
    settings = ServerSettings.from_config(config)
    state, classes = run.load_checkpoint() if resume else (None, None)
    if state is not None:
        run.rewind(state.round)
    strategy = FlexLoRAStrategy(
        settings, run=run, observer=observer, state=state, rank_classes=classes
    )
    try:
        strategy.start(grid)
    finally:
        if strategy.state is not None and strategy.roster.members:
            write_adapters(strategy, config, run)
    return strategy


def write_adapters(strategy: FlexLoRAStrategy, config: Config, run: RunFolder) -> None:
    """``adapters/CLASS`` for every rank class and ``adapters/global`` at the server's full rank."""
    change, factoring = strategy.state.change, strategy.settings.factoring
    base = resolve_name(config["model.name"])
    for name, rank_class in strategy.roster.rank_classes.items():
        adapter = change.adapter(rank_class.ranks(change.shapes), **vars(factoring))
        save_adapter(
            adapter,
            run.path / "adapters" / name,
            base=base,
            fan_in_fan_out=strategy.roster.fan_in_fan_out,
        )
    save_adapter(
        change.full_rank_adapter(factoring.alpha, rslora=factoring.rslora),
        run.path / "adapters" / "global",
        base=base,
        fan_in_fan_out=strategy.roster.fan_in_fan_out,
    )
