"""Whether a finished run has trained anything, from its two tables.

A run in which every training failed, or whose rounds were all skipped, leaves the model as it was:
scripts must learn that from the exit status. Failed evaluations do not count here; without a score
``metrics.jsonl`` has no ``eval_loss``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from flexlora.runs.folder import RunFolder
from flexlora.runs.outcomes import Outcome

__all__ = ["nobody_trained"]


def nobody_trained(run: RunFolder) -> str:
    """One sentence with the most frequent cause if no round changed the model, else nothing."""
    rounds = [row for row in run.metrics() if row["round"] > 0]
    if not rounds or any(row.get("clients_ok") and not row.get("skipped") for row in rounds):
        return ""
    rows = [row for row in run.client_rows() if row["round"] != "0"]
    asked = [row for row in rows if row["status"] not in _NOT_ASKED]
    failed = [row for row in asked if row["status"] != Outcome.OK.status]
    what = "no client was trained" if len(failed) == len(asked) else "no update counted"
    count = f"{what} in {_counted(len(rounds), 'round')}"
    if failed:
        count += f" ({len(failed)} of {_counted(len(asked), 'training')} failed)"
    causes = [row["cause"] for row in failed if row["cause"]]
    skipped = [str(row["skipped"]) for row in rounds if row.get("skipped")]
    # Where some were trained, too few came: the rounds say so.
    cause = _most_frequent(causes or skipped if len(failed) == len(asked) else skipped or causes)
    return (
        f"{count}, so the model is as it was and no adapters are written: "
        f"{cause or 'no client was asked'}; '{run.path}' has metrics.jsonl and clients.csv."
    )


_NOT_ASKED = (Outcome.LEFT_OUT.status, Outcome.BACKING_OFF.status, Outcome.NOT_NEEDED.status)


def _most_frequent(texts: Sequence[str]) -> str:
    """The first of the most frequent kind; clients' ids and numbers differ within a kind."""
    if not texts:
        return ""
    kinds = Counter(map(_kind, texts))
    kind, count = kinds.most_common(1)[0]
    example = next(text for text in texts if _kind(text) == kind)
    mostly = "" if len(kinds) == 1 else f"{count} times "
    return f"{mostly}{' '.join(example.split()).rstrip('.')}"


def _kind(cause: str) -> str:
    return re.sub(r"\d+", "#", re.sub(r"client \S+:", "", cause))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
