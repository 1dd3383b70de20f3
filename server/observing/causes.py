"""What became of a client, from the cause that observers are told: one of a few kinds.

A cause is a free text, part of it written by clients; a label of a metric must not be. The kinds
are those of the rows ``failed`` and ``refused`` of ``clients.csv``. A cause may also be a note on
an update that counts: late, or trained in smaller passes.
"""

from __future__ import annotations

import re

__all__ = ["KINDS", "failure_kind", "of_another_round"]

EVALUATION = "evaluation"
SKIPPED = "round skipped"
_LATE = re.compile(r"late: trained from round \d+(; )?")
# The codes are flwr's, of a message, a node or a process that is gone.
_PATTERNS = {
    "": r"out of memory with \d+ rows in a pass: trained with|personal factors: ",
    SKIPPED: r"skipped: ",
    EVALUATION: r"evaluation: ",
    "lost": r"Flower error [3458]\b",
    "silent": r"no reply within",
    "out of memory": r"out of memory at rank",
    "refused": r"client .*: |unreadable reply: |dropped, as ",
}
KINDS = (*(kind for kind in _PATTERNS if kind), "failed")


def failure_kind(cause: str) -> str:
    """One of ``KINDS``; empty where the update counts."""
    cause = _LATE.sub("", cause, count=1) if _LATE.match(cause) else cause
    if not cause:
        return ""
    return next((k for k, pattern in _PATTERNS.items() if re.match(pattern, cause)), "failed")


def of_another_round(cause: str) -> bool:
    """Whether it was said of an update that an earlier round asked for."""
    return _LATE.match(cause) is not None
