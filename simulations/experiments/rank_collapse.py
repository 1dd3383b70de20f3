"""``flexlora reproduce rank-collapse``: how much of the tail of ``G`` each method retains by round.

Real runs on the built-in tasks (``tail_energy.py``), four clients in five at rank 2, all at server
rate 1, so that the methods differ only in how they treat the tail (arXiv 2602.13486). A test checks
that untrained rounds follow the law exactly (``tests/support/rank_law.py``).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from flexlora.simulations.experiments.checks import Check, print_verdict
from flexlora.simulations.experiments.request import Request
from flexlora.simulations.experiments.variant_table import run_variants
from flexlora.simulations.experiments.variants import SKEW, Variant

__all__ = ["VARIANTS", "rank_collapse", "run_checks"]

MEASURED = {"eval.split": "test", "eval.max-examples": 0, "eval.every": 1, "eval.generate": "never"}
TITLES = {"flexlora": "FlexLoRA as published", "residual": "residual", "carried": "carried"}
PUBLISHED = TITLES["flexlora"]
VARIANTS = tuple(
    Variant(
        title=title,
        kind="tail",
        changes={"method.name": name, "method.server-learning-rate": 1.0, "eval.every": 1, **SKEW},
    )
    for name, title in TITLES.items()
)

Scores = Mapping[str, Any]


def rank_collapse(request: Request) -> int:
    """Run the variants, print the table by round and the verdict."""
    results = run_variants(request, VARIANTS, MEASURED)
    runs = [row for row in results.of_seeds(request.seeds) if "rounds" in row]
    request.console.print()
    request.console.print(course_table(runs))
    request.console.print(f"Numbers: {results.file}", soft_wrap=True)
    return print_verdict(run_checks(runs), request.console, scale=request.scale)


def course_table(rows: Sequence[Scores]) -> Table:
    """Means over the seeds by round: tail share of the energy, retained part of it, eval loss."""
    table = Table(
        title="Clients train: the tail above rank 2 by round",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    rounds = sorted({entry["round"] for row in rows for entry in row["rounds"]})
    for server_round in rounds:
        table.add_column(str(server_round), justify="right", no_wrap=True)
    kinds = (("share", "share of the energy"), ("kept", "kept of the last"), ("loss", "eval loss"))
    for title in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == title]
        if title == PUBLISHED:
            cells = (f"{mean_of(runs, 'law', r):.2f}" for r in rounds)
            table.add_row("kept by the law, untrained", *cells)
        for key, label in kinds:
            cells = (f"{mean_of(runs, key, r):.3g}" for r in rounds)
            table.add_row(f"{title}: {label}", *cells)
    return table


def mean_of(rows: Sequence[Scores], key: str, server_round: int | None = None) -> float:
    """The mean of a figure over rows and rounds (one round, or all of them); NaN without any."""
    values = [
        entry[key]
        for row in rows
        for entry in row["rounds"]
        if server_round in (None, entry["round"]) and entry[key] is not None
    ]
    return statistics.fmean(values) if values else float("nan")


def run_checks(rows: Sequence[Scores]) -> list[Check]:
    """Checks on training runs: the published form loses the tail, the other two retain it.

    Training relearns a part of the tail and adds new directions to it, so the tolerances are wide;
    they were set from three seeds.
    """
    by_title = {
        title: [row for row in rows if row["variant"] == title] for title in TITLES.values()
    }
    last = {title: _last(by_title[title], "share") for title in by_title}
    law = mean_of(by_title[PUBLISHED], "law")
    checks = [
        Check(
            claim=f"{PUBLISHED} keeps of the last round's tail, mean of all rounds, by the law",
            expected=law,
            seen=mean_of(by_title[PUBLISHED], "kept"),
            tolerance=0.2,
        )
    ]
    for title in (TITLES["residual"], TITLES["carried"]):
        claim = f"{title} keeps of the last round's tail, mean of all rounds"
        seen = mean_of(by_title[title], "kept")
        checks.append(Check(claim=claim, expected=1.0, seen=seen, tolerance=0.15))
        claim = f"{PUBLISHED} ends with this part of the tail's share under {title}"
        ratio = last[PUBLISHED] / last[title] if last[title] else float("nan")
        checks.append(Check(claim=claim, expected=0.0, seen=ratio, tolerance=0.05, sense="at most"))
        claim = f"{PUBLISHED} ends with a loss above that of {title} by"
        seen = _last(by_title[PUBLISHED], "loss") - _last(by_title[title], "loss")
        checks.append(Check(claim=claim, expected=0.0, seen=seen, tolerance=0.02, sense="at least"))
    return checks


def _last(rows: Sequence[Scores], key: str) -> float:
    ends = [row["rounds"][-1]["round"] for row in rows if row["rounds"]]
    return mean_of(rows, key, max(ends)) if ends else float("nan")
