"""The events of a run: what an observer may react to, the log, and several observers at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flexlora.errors import one_line
from flexlora.runs.outcomes import Outcome

if TYPE_CHECKING:  # a terminal shows its first line before torch is loaded
    from flexlora.server.members.roster import Roster

__all__ = ["LogObserver", "Observer", "Observers"]

LOG = logging.getLogger(__name__)


class Observer:
    """Called by the strategy at every event; override the events that matter.

    A handler returns quickly and changes nothing. The texts of ``cause`` are for people: what
    became of a client is its ``outcome``.
    """

    def read(self, layouts: Mapping[str, int]) -> None:
        """A simulation's rows that were read from keys of other tools: how many, by these keys."""

    def waiting(self, what: str, seconds: float) -> None:
        """The run waits for ``what``, nodes or clients, and for ``seconds`` more at most."""

    def met(self, roster: Roster) -> None:
        """The members, their rank classes and who was left out; again when they change."""

    def round_started(self, server_round: int, num_rounds: int, num_clients: int) -> None:
        """Messages go to ``num_clients`` clients; round 0 evaluates the base."""

    def replied(self, client_id: str, outcome: Outcome, cause: str, late: bool) -> None:
        """A client's part in a round is decided; ``late`` for a message of an earlier round.

        Where the outcome is OK, a cause is a note: what was different about this training.
        """

    def resent(self, client_id: str, attempt: int, cause: str) -> None:
        """A message was lost and is sent for the ``attempt``-th time."""

    def round_skipped(self, server_round: int, cause: str) -> None:
        """The round changes nothing, as fewer than the quorum trained."""

    def evaluated(self, client_id: str, cause: str) -> None:
        """A client has evaluated, or has not and why."""

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        """The row of ``metrics.jsonl``."""


class LogObserver(Observer):
    """One line per event in the log, for ``flwr run``."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger

    def waiting(self, what: str, seconds: float) -> None:
        self.logger.info("waiting for %s, at most %.0f s more", what, seconds)

    def met(self, roster: Roster) -> None:
        for name in roster.rank_classes:
            members = [m for m in roster.members.values() if m.rank_class.name == name]
            bases = ", ".join(sorted({m.capability.quantization for m in members}))
            devices = ", ".join(sorted({m.capability.device for m in members}))
            line = "rank class %s: %d clients; base %s; on %s"
            self.logger.info(line, name, len(members), bases, devices)
        if roster.coverage:
            self.logger.warning("%s", roster.coverage)
        for client_id, cause in sorted(roster.left_out.items()):
            self.logger.warning("client %s left out: %s", client_id, cause)

    def round_started(self, server_round: int, num_rounds: int, num_clients: int) -> None:
        self.logger.info("round %d/%d: %d clients", server_round, num_rounds, num_clients)

    def replied(self, client_id: str, outcome: Outcome, cause: str, late: bool) -> None:
        if cause and outcome is not Outcome.NOT_NEEDED:
            self.logger.warning("client %s: %s", client_id, cause)

    def resent(self, client_id: str, attempt: int, cause: str) -> None:
        self.logger.warning("client %s: sent again (%d), %s", client_id, attempt, cause)

    def round_skipped(self, server_round: int, cause: str) -> None:
        self.logger.warning("round %d: %s", server_round, cause)

    def evaluated(self, client_id: str, cause: str) -> None:
        if cause:
            self.logger.warning("client %s: evaluation: %s", client_id, cause)

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        shown = {k: v for k, v in metrics.items() if isinstance(v, int | float) and v == v}
        text = ", ".join(f"{k} {v:.4g}" for k, v in shown.items() if "/" not in k)
        self.logger.info("%s", text)
        if "left_out" in metrics:
            self.logger.warning("%s", metrics["left_out"])
        if "budget_spent" in metrics:
            self.logger.warning("the last round: %s", metrics["budget_spent"])


class Observers(Observer):
    """Passes every event to ``ours`` and then to ``caller``.

    One of ``ours`` that raises is logged once and ends no run; what ``caller`` raises, passes.
    """

    def __init__(self, ours: Sequence[Observer], caller: Observer | None = None) -> None:
        self.ours, self.caller = tuple(ours), caller or Observer()
        self._logged: set[int] = set()

    def read(self, layouts: Mapping[str, int]) -> None:
        self._pass_on("read", layouts)

    def waiting(self, what: str, seconds: float) -> None:
        self._pass_on("waiting", what, seconds)

    def met(self, roster: Roster) -> None:
        self._pass_on("met", roster)

    def round_started(self, server_round: int, num_rounds: int, num_clients: int) -> None:
        self._pass_on("round_started", server_round, num_rounds, num_clients)

    def replied(self, client_id: str, outcome: Outcome, cause: str, late: bool) -> None:
        self._pass_on("replied", client_id, outcome, cause, late)

    def resent(self, client_id: str, attempt: int, cause: str) -> None:
        self._pass_on("resent", client_id, attempt, cause)

    def round_skipped(self, server_round: int, cause: str) -> None:
        self._pass_on("round_skipped", server_round, cause)

    def evaluated(self, client_id: str, cause: str) -> None:
        self._pass_on("evaluated", client_id, cause)

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        self._pass_on("round_finished", metrics)

    def _pass_on(self, event: str, *args: object) -> None:
        for place, observer in enumerate(self.ours):
            try:
                getattr(observer, event)(*args)
            except Exception as error:
                if place not in self._logged:
                    name = type(observer).__name__
                    LOG.warning("%s fails, and the run goes on: %s", name, one_line(error))
                self._logged.add(place)
        getattr(self.caller, event)(*args)
