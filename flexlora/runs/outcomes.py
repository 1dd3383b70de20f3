"""The outcome of a client in a round, as a value; its cause is a separate free text.

``status`` is the word in ``clients.csv``. The outcome is the ``cause`` label of the Prometheus
metrics: causes have text from clients, which must not become labels.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Outcome"]


class Outcome(StrEnum):
    """One per client and message."""

    OK = "ok"  # the update was added to the sum
    FAILED = "failed"  # the client reported a failure or sent an unreadable reply
    REFUSED = "refused"  # the update is invalid
    OUT_OF_MEMORY = "out of memory"  # one row does not fit at the rank that was sent
    LOST = "lost"  # Flower lost the node, the process, the message or the reply
    SILENT = "silent"  # no reply by the deadline
    NOT_NEEDED = "not needed"  # enough other clients replied first
    BACKING_OFF = "backing off"  # not asked, since earlier messages were lost
    LEFT_OUT = "left out"  # takes no part in the run

    @property
    def is_failure(self) -> bool:
        """Whether the client was asked and its update is missing."""
        return self in _FAILURES

    @property
    def status(self) -> str:
        """The word in ``clients.csv``; its cause has the kind of failure."""
        return "failed" if self.is_failure and self is not Outcome.REFUSED else self.value


_FAILURES = (
    Outcome.FAILED,
    Outcome.REFUSED,
    Outcome.OUT_OF_MEMORY,
    Outcome.LOST,
    Outcome.SILENT,
)
