"""Scores of adapters as one JSON value: in all, by group of rows, category, task and client.

    {"all": TABLE, "groups": {NAME: TABLE}, "categories": ..., "tasks": ..., "clients": ...}

A TABLE has every adapter's metrics, and differences of pairs of adapters with their interval: each
adapter against the base, and personal factors against each client's own class on the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexlora.evaluation.bootstrap import LEVEL, RESAMPLES, paired_difference
from flexlora.evaluation.evaluate import BASE
from flexlora.evaluation.metrics import METRICS, means
from flexlora.simulations.scoring import OWN_CLASS, Cell, total
from flexlora.wire.jobs import PERSONAL, Score

__all__ = ["distinct_names", "score_report"]


def score_report(cells: Sequence[Cell], *, seed: int) -> dict[str, Any]:
    """All tables of ``cells``, ready for JSON."""
    names = distinct_names(cells)
    splits: dict[str, Callable[[Cell], str]] = {
        "groups": lambda cell: cell.group,
        "categories": lambda cell: cell.category,
        "tasks": lambda cell: cell.task,
        "clients": lambda cell: cell.client_id,
    }
    bootstrap = {"unit": "client", "resamples": RESAMPLES, "level": LEVEL, "seed": seed}
    report: dict[str, Any] = {
        "bootstrap": bootstrap,
        "equal_adapters": [same for same in names.values() if len(same) > 1],
        "all": _table(cells, names, seed),
    }
    for title, key in splits.items():
        parts: dict[str, list[Cell]] = {}
        for cell in cells:
            parts.setdefault(key(cell), []).append(cell)
        report[title] = {name: _table(part, names, seed) for name, part in sorted(parts.items())}
    return report


def distinct_names(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Adapters with equal scores everywhere, under the first of them, in order.

    Under ``carried`` every rank class is served the same adapter, up to the rounding of its
    factors.
    """
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for cell in cells for name in cell.scores):
        same = (first for first in found if all(_alike(cell, first, name) for cell in cells))
        found.setdefault(next(same, name), []).append(name)
    return found


def _alike(cell: Cell, name: str, other: str) -> bool:
    one, two = cell.scores.get(name), cell.scores.get(other)
    if one is None or two is None:
        return one is two
    pairs = zip(vars(one).values(), vars(two).values(), strict=True)
    return all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)


def _table(cells: Sequence[Cell], names: Mapping[str, list[str]], seed: int) -> dict[str, Any]:
    clients: dict[str, dict[str, Score]] = {}
    for cell in cells:
        of_client = clients.setdefault(cell.client_id, {})
        for name, score in cell.scores.items():
            of_client[name] = of_client.get(name, Score()) + score
    adapters: dict[str, dict[str, float]] = {}
    for name, same in names.items():
        score = total(scores[name] for scores in clients.values() if name in scores)
        if score.rows:
            adapters |= dict.fromkeys(same, _values(score))
    pairs = [(name, BASE) for name in names if name != BASE and name in adapters]
    if PERSONAL in adapters:
        pairs.append((PERSONAL, _global_of_personal(names)))
    differences = [row for pair in pairs for row in _differences(clients, *pair, seed)]
    return {"clients": len(clients), "adapters": adapters, "differences": differences}


def _values(score: Score) -> dict[str, float]:
    found = means(score)
    if "loss" in found and found["loss"] < 700:
        found["perplexity"] = math.exp(found["loss"])
    return found | {"rows": score.rows}


def _global_of_personal(names: Mapping[str, list[str]]) -> str:
    """The name of the scores of each client at the client's class, or at the only one."""
    known = [name for same in names.values() for name in same if name not in (BASE, PERSONAL)]
    return OWN_CLASS if OWN_CLASS in known else known[0]


def _differences(
    clients: Mapping[str, Mapping[str, Score]], name: str, against: str, seed: int
) -> list[dict[str, Any]]:
    both = [scores for scores in clients.values() if name in scores and against in scores]
    ours, theirs = [scores[name] for scores in both], [scores[against] for scores in both]
    rows: list[dict[str, Any]] = []
    for metric in METRICS:
        found = paired_difference(metric, ours, theirs, seed=seed)
        if found is not None:
            row = {"adapter": name, "against": against, "metric": metric.key}
            rows.append(row | vars(found))
    return rows
