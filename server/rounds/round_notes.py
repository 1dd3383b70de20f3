"""The notes of a checkpoint: what a resumed run needs beside the state and the rank classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexlora.runs.sources import Sources
from flexlora.server.transport.clocks import Clock, clock_state

if TYPE_CHECKING:
    from flexlora.server.strategy import FlexLoRAStrategy

__all__ = ["round_notes"]


def round_notes(
    strategy: FlexLoRAStrategy, clock: Clock, under_way: dict[str, list[str]]
) -> dict[str, Any]:
    """``under_way`` holds the clients of whom late replies may come, by round."""
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
    notes["fan_in_fan_out"] = roster.fan_in_fan_out
    return notes
