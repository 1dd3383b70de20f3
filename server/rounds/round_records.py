"""What a round leaves in the run folder: its rows, then the checkpoint with its notes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from flexlora.runs.sources import Sources
from flexlora.server.rounds.client_rows import left_out_rows
from flexlora.server.rounds.evaluation import evaluation_rows
from flexlora.server.rounds.round_metrics import module_metrics
from flexlora.server.transport.clocks import Clock, clock_state
from flexlora.wire.jobs import EvalResult

if TYPE_CHECKING:
    from flexlora.server.strategy import FlexLoRAStrategy

__all__ = ["write_round"]


def write_round(
    strategy: FlexLoRAStrategy,
    values: dict[str, Any],
    evaluations: Sequence[EvalResult],
    clock: Clock,
) -> None:
    """Write the rows, then the checkpoint: a resume removes rows that have no checkpoint.

    ``values`` is the round's line in ``metrics.jsonl``; its ``modules`` are added here.
    """
    run, roster, metrics = strategy.run, strategy.roster, strategy.metrics
    if run is None:
        return
    server_round, rows = metrics.server_round, metrics.rows
    if server_round == 0:
        rows = left_out_rows(0, roster.left_out)
    else:
        values["modules"] = module_metrics(strategy.state, roster.rank_classes)
    cells = [row.cells() for row in sorted(rows, key=lambda row: row.client_id)]
    run.append_round(values, cells, evaluation_rows(server_round, evaluations))
    if strategy.canaries is not None:
        with run.writing("the canaries' scores"):
            strategy.canaries.record.write(run.path)
    under_way, wire = strategy.late.write(run), strategy.config.wire.dtype
    log = partial(metrics.log, run.audit, strategy.state.round)
    run.save_checkpoint(
        run.checkpoint,
        strategy.state,
        {client_id: member.rank_class for client_id, member in roster.members.items()},
        _notes(strategy, clock, under_way),
        keep=strategy.config.server.keep_checkpoints,
        before_commit=partial(log, roster.fingerprint, wire),
    )
    strategy.late.remove_unneeded(run)


def _notes(
    strategy: FlexLoRAStrategy, clock: Clock, under_way: dict[str, list[str]]
) -> dict[str, Any]:
    """What a resumed run needs beside the state and the rank classes.

    ``under_way`` holds the clients of whom late replies may come, by round.
    """
    roster = strategy.roster
    sources = strategy.sources or Sources(base=roster.fingerprint)
    notes = {
        "history": strategy.selector.history.to_dict(),
        "under_way": under_way,
        **clock_state(clock),
        "sources": sources.to_dict(),
        "norms": strategy.norms.to_dict(),
    }
    if strategy.skipped.numbers:
        notes["skipped_rounds"] = strategy.skipped.numbers
    if strategy.metrics.measured:  # the node ids of a simulation are Ray's of the day
        notes["nodes"] = strategy.membership.bindings.to_dict()
    if strategy.privacy.active:
        notes["privacy"] = strategy.privacy.to_dict()
    if strategy.client_privacy.active:
        notes["client_privacy"] = strategy.client_privacy.to_dict()
    notes["fan_in_fan_out"] = roster.fan_in_fan_out
    return notes
