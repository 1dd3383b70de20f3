"""The Flower ServerApp, and ``federate``: the run that every engine shares.

``flwr run .`` calls ``app``; ``flexlora simulate`` calls ``federate`` with a grid of its own.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import flexlora
from flexlora.config.resolve import Config, of_flower, resolved
from flexlora.deploy.request_watch import RequestWatch, watch_requests
from flexlora.errors import RunFailed, TooFewNodes, TooFewUpdates, UserError
from flexlora.runs.audit import RESUMED, STARTED
from flexlora.runs.canary_file import CanaryRecord
from flexlora.runs.checkpoints import checkpoint_digest
from flexlora.runs.folder import RunFolder
from flexlora.runs.lock import exclusive_lock
from flexlora.runs.sources import Sources, check_same
from flexlora.runs.verdict import nobody_trained
from flexlora.server.observing.observed import observed
from flexlora.server.observing.observer import LogObserver, Observer
from flexlora.server.publishing import publish
from flexlora.server.results import write_adapters
from flexlora.server.resuming import FINAL, check_start, destination_of, settle, start_state
from flexlora.server.rounds.canary_rounds import CanaryRounds
from flexlora.server.settings import check_config
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.server.transport.flower_private import ProtobufClient

__all__ = ["app", "federate"]

LOG = logging.getLogger(__name__)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the run's configuration, or go on with it, in a run folder.

    Raises:
        UserError, RunFailed: as ``federate``; with ``FINAL`` where a new try would end the same.
    """
    # A 500 would end the run, or the heartbeat, after which the SuperLink ends it.
    watch_requests(ProtobufClient, RequestWatch())
    try:
        _run(grid, context)
    except (TooFewNodes, TooFewUpdates):
        raise
    except (UserError, RunFailed) as error:
        if "server.metrics-port is" in str(error):  # somebody else's port: another day it is free
            raise
        raise type(error)(f"{FINAL}{error}") from None


def _run(grid: Grid, context: Context) -> None:
    to = destination_of(resolved(Config.of(of_flower(context.run_config))), context.run_id)
    logger = logging.getLogger("flwr")
    logger.info("run folder: %s%s", to.folder.resolve(), ", going on" if to.resume else "")
    federate(
        grid,
        to.config,
        to.folder,
        observer=LogObserver(logger),
        overwrite=to.overwrite,
        resume=to.resume,
        run_id=context.run_id,
        allow_changed=to.allow_changed,
    )


def federate(
    grid: Grid,
    config: Config,
    out: Path,
    *,
    observer: Observer | None = None,
    overwrite: bool = False,
    resume: bool = False,
    run_id: int | None = None,
    sources: Sources | None = None,
    allow_changed: bool = False,
    flag: str = "allow-changed=true",
    canaries: CanaryRecord | None = None,
) -> FlexLoRAStrategy:
    """Run the rounds over ``grid`` into the folder ``out``, made once a client can train.

    Whatever ends the rounds, the adapters of the last one that was written whole are written,
    unless all are over and no client was trained.

    Args:
        run_id: Flower's, which marks the folder (``resuming.py``).
        sources: the base and the rows, where the caller has them; default: the nodes' base.
        allow_changed: resume although the sources are others than in the checkpoint; ``flag`` is
            what a person gives for that.
        canaries: those of a grid whose clients ``audit.canaries`` are among.

    Raises:
        UserError: settings that contradict each other, too few nodes, no client that can train, a
            folder in use, nothing to resume, other sources than before.
        RunFailed: no client was trained in any round.
    """
    check_config(config)
    if config.audit.canaries and canaries is None:
        raise UserError(
            f"audit.canaries is {config.audit.canaries}, but canaries are clients of a simulation; "
            "use `flexlora simulate`, or leave it out."
        )
    state, classes = RunFolder(out).load_checkpoint() if resume else (None, None)
    watched = observed(out, config, observer, resumed=resume, deployed=run_id is not None)
    with ExitStack() as held, watched as watcher:
        strategy = FlexLoRAStrategy(config, observer=watcher, state=state, rank_classes=classes)
        strategy.canaries = CanaryRounds(record=canaries) if canaries is not None else None
        if state is not None:
            strategy.membership.bindings.restore(RunFolder(out).load_notes())
        compared = partial(_refuse_changed, out, config, allow_changed, flag)
        if state is not None and sources is not None:
            compared(sources)  # before the nodes are asked and anything is shown
        if state is None and config.start_from:
            strategy.initial = start_state(config)
        strategy.meet(grid)
        strategy.sources = sources or Sources(base=strategy.roster.fingerprint)
        if state is None:
            if strategy.initial is not None:
                check_start(strategy.initial, strategy.roster.shapes, config)
                base = Sources(base=strategy.roster.fingerprint)  # the rows may be new ones
                _refuse_changed(Path(config.start_from), config, allow_changed, flag, base)
            strategy.run = RunFolder.create(out, config, overwrite=overwrite)
            held.enter_context(exclusive_lock(out))
        else:
            held.enter_context(exclusive_lock(out))
            strategy.run = RunFolder(out)
            if sources is None:
                compared(strategy.sources)
            strategy.run.rewind(state.round)
            strategy.restore(strategy.run.load_notes(), grid)
        _open_log(strategy, config)
        if run_id is not None:
            strategy.origin = settle(strategy.run, config, run_id)
        untrained = ""
        try:
            strategy.start(grid)
            untrained = nobody_trained(strategy.run)
        finally:
            closed = strategy.closed
            if closed is not None and not untrained:
                write_adapters(
                    strategy.run,
                    {**strategy.served(closed), "global": strategy.global_adapter(closed)},
                    config,
                    server_round=closed.round,
                    fingerprint=strategy.roster.fingerprint,
                    fan_in_fan_out=strategy.roster.fan_in_fan_out,
                )
        if strategy.ended:
            raise TooFewUpdates(strategy.ended)
        if untrained:
            raise RunFailed(untrained)
        if config.server.publish:
            publish(strategy.run, config.server.publish, strategy.state.round)
    return strategy


def _refuse_changed(out: Path, config: Config, allowed: bool, flag: str, sources: Sources) -> None:
    """Compare ``sources`` with those of the run in ``out``, which is to go on.

    Raises:
        UserError: they are others, and that is not ``allowed``.
    """
    changed = check_same(
        RunFolder(out).sources(),
        sources,
        run=str(out),
        model=config.model.name,
        allowed=allowed,
        flag=flag,
    )
    if changed:
        LOG.warning(changed)


def _open_log(strategy: FlexLoRAStrategy, config: Config) -> None:
    """The first line of this process in ``audit.jsonl``: a run that starts, or one that goes on."""
    run = strategy.run
    assert run is not None
    about = {
        "base": strategy.roster.fingerprint,
        "wire": config.wire.dtype,
        "method": config.method.name,
        "flexlora": flexlora.__version__,
    }
    with run.writing("the audit log"):
        if strategy.closed is None:
            run.audit.append(STARTED, **about)
        else:
            server_round, digest = checkpoint_digest(run.checkpoint)
            run.audit.append(RESUMED, round=server_round, checkpoint=digest, **about)
