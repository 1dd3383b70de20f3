"""What a run tells while it goes: to a terminal (``simulations/terminal.py``) or to a log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from flexlora.server.members.roster import Roster

__all__ = ["LogObserver", "Observer"]


class Observer(Protocol):
    """Called by the strategy; every call returns quickly and changes nothing.

    An observer with a method ``resent(client_id, attempt, cause)`` is told of every message that
    was lost and goes out for the ``attempt``-th time; one without is not.
    """

    def met(self, roster: Roster) -> None:
        """Who takes part, at which rank, and who was left out."""

    def round_started(self, server_round: int, num_rounds: int, num_clients: int) -> None:
        """A round goes out to ``num_clients`` clients; round 0 is the base, before any training."""

    def replied(self, client_id: str, cause: str) -> None:
        """A client's reply was counted (no cause) or not (why)."""

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        """The row of ``metrics.jsonl``."""


class LogObserver:
    """One line per event in the log, for ``flwr run``."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger

    def met(self, roster: Roster) -> None:
        for name in roster.rank_classes:
            members = [m for m in roster.members.values() if m.rank_class.name == name]
            bases = sorted({m.capability.quantization for m in members})
            devices = sorted({m.capability.device for m in members})
            told = name, len(members), ", ".join(bases), ", ".join(devices)
            self.logger.info("rank class %s: %d clients; base %s; on %s", *told)
        for client_id, cause in sorted(roster.left_out.items()):
            self.logger.warning("client %s left out: %s", client_id, cause)

    def round_started(self, server_round: int, num_rounds: int, num_clients: int) -> None:
        self.logger.info("round %d/%d: %d clients", server_round, num_rounds, num_clients)

    def replied(self, client_id: str, cause: str) -> None:
        if cause:
            self.logger.warning("client %s: %s", client_id, cause)

    def resent(self, client_id: str, attempt: int, cause: str) -> None:
        self.logger.warning("client %s: sent again (%d), %s", client_id, attempt, cause)

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        shown = {k: v for k, v in metrics.items() if isinstance(v, int | float) and v == v}
        text = ", ".join(f"{k} {v:.4g}" for k, v in shown.items() if "/" not in k)
        self.logger.info("%s", text)
