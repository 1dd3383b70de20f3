"""What became of a client in a round, as a value; the cause, a free text, stands beside it.

``status`` is the word in ``clients.csv``. The outcome itself is the ``cause`` label of the metrics
for Prometheus: clients write part of every cause, and must not make labels.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Outcome"]


class Outcome(StrEnum):
    """One per client and message; that a reply came in a later round is noted beside it."""

    OK = "ok"  # the update is in the sum
    FAILED = "failed"  # the client says that it could not train, or sent nothing that can be read
    REFUSED = "refused"  # its update must not reach the sum
    OUT_OF_MEMORY = "out of memory"  # not even one row fits at the rank that it was sent
    LOST = "lost"  # Flower lost the node, the process, the message or the reply
    SILENT = "silent"  # no reply by the deadline
    NOT_NEEDED = "not needed"  # enough others answered first
    BACKING_OFF = "backing off"  # not asked, since its messages got lost
    LEFT_OUT = "left out"  # takes no part in the run

    @property
    def is_failure(self) -> bool:
        """Whether the client was asked and should have been in the sum."""
        return self in _FAILURES

    @property
    def status(self) -> str:
        """The word in ``clients.csv``, where the cause says which kind of failure it was."""
        return "failed" if self.is_failure and self is not Outcome.REFUSED else self.value


_FAILURES = (
    Outcome.FAILED,
    Outcome.REFUSED,
    Outcome.OUT_OF_MEMORY,
    Outcome.LOST,
    Outcome.SILENT,
)
